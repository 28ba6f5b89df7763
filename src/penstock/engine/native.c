/* Paged attention, the small operations around it and the drawing of tokens, float32, for one thread.
 *
 * native.py compiles this for one model; HEADS, KV_HEADS, HEAD_DIM (a multiple of 8) and BLOCK (tokens in a
 * KV block, a multiple of 8) are given on the command line. attention.py says what each function computes
 * and how a block of the cache is laid out.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define GROUP (HEADS / KV_HEADS)
#define WIDTH ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
#define LANES 8
#define PARTS (HEAD_DIM / LANES)
#define TILES (BLOCK / LANES)

/* Eight floats at any address; compilers map it to what the CPU has. */
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

static inline floats load(const float *from) { return *(const floats *)from; }
static inline void store(float *to, floats value) { *(floats *)to = value; }
static inline floats all(float value) { return (floats){} + value; }

static inline floats pick(ints where, floats yes, floats no) {
    return (floats)((where & (ints)yes) | (~where & (ints)no));
}

static inline floats larger(floats a, floats b) { return pick(a > b, a, b); }

static inline float sum(floats v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

static inline float largest(floats v) {
    float top = v[0];
    for (int i = 1; i < LANES; i++) top = top > v[i] ? top : v[i];
    return top;
}

/* e^x to 2 ulp: 2^n * e^r with |r| <= ln(2)/2, the polynomial of Cephes' expf. 0 below -87.3, so of -inf. */
static inline floats exponential(floats x) {
    ints vanishes = x < -87.3f;
    x = pick(vanishes, all(0.0f), x);
    x = pick(x > 88.0f, all(88.0f), x);
    floats y = x * 1.44269504f;
    ints n = __builtin_convertvector(y + pick(y < 0.0f, all(-0.5f), all(0.5f)), ints);
    floats whole = __builtin_convertvector(n, floats);
    floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return pick(vanishes, all(0.0f), (p * r * r + r + 1.0f) * (floats)((n + 127) << 23));
}

/* out = x / rms(x) * weight over `size` elements, a multiple of 8; out may be x. */
static inline void norm_row(float *out, const float *x, const float *weight, int64_t size, float eps) {
    floats squares = all(0.0f);
    for (int64_t i = 0; i < size; i += LANES) squares += load(x + i) * load(x + i);
    floats scale = all(1.0f / sqrtf(sum(squares) / (float)size + eps));
    for (int64_t i = 0; i < size; i += LANES) store(out + i, load(x + i) * scale * load(weight + i));
}

void norm(float *out, const float *x, const float *weight, int64_t tokens, int64_t size, float eps) {
    for (int64_t t = 0; t < tokens; t++) norm_row(out + t * size, x + t * size, weight, size, eps);
}

void add_norm(float *delta, float *residual, const float *weight, int64_t tokens, int64_t size, float eps) {
    for (int64_t t = 0; t < tokens; t++) {
        float *d = delta + t * size, *r = residual + t * size;
        for (int64_t i = 0; i < size; i += LANES) store(r + i, load(r + i) + load(d + i));
        norm_row(d, r, weight, size, eps);
    }
}

/* The result replaces gate; rows stay 2 * size apart. */
void silu_mul(float *gate_up, int64_t tokens, int64_t size) {
    for (int64_t t = 0; t < tokens; t++) {
        float *gate = gate_up + t * 2 * size, *up = gate + size;
        for (int64_t i = 0; i < size; i += LANES) {
            floats g = load(gate + i);
            store(gate + i, g / (1.0f + exponential(-g)) * load(up + i));
        }
    }
}

/* What is the same for all layers of a step; native.py fills it. */
typedef struct {
    const int32_t *tables, *rows, *starts, *offsets;
    const float *rotary; /* [positions, 2, HEAD_DIM / 2] */
    float *scratch;      /* [GROUP, scratch_width]: scores, scratch_width a multiple of BLOCK */
    int64_t table_width, scratch_width, sequences;
    float eps;
} Step;

typedef struct {
    float *cache;                 /* [blocks, KV_HEADS, 2, HEAD_DIM * BLOCK] */
    const float *q_norm, *k_norm; /* [HEAD_DIM], or NULL */
} Layer;

#define HALF (HEAD_DIM * BLOCK)

/* A head's keys [HEAD_DIM, BLOCK] in a block; its values [BLOCK, HEAD_DIM] follow at HALF. */
static inline float *keys_of(const Layer *layer, int32_t block, int head) {
    return layer->cache + ((size_t)block * KV_HEADS + head) * 2 * HALF;
}

/* Norm (where the model has it), rotate and scale one head in place. */
static inline void turn(float *head, const float *weight, const float *rotary, float scale, float eps) {
    if (weight) norm_row(head, head, weight, HEAD_DIM, eps);
    for (int i = 0; i < HEAD_DIM / 2; i++) {
        float cos = rotary[i] * scale, sin = rotary[HEAD_DIM / 2 + i] * scale;
        float a = head[i], b = head[HEAD_DIM / 2 + i];
        head[i] = a * cos - b * sin;
        head[HEAD_DIM / 2 + i] = b * cos + a * sin;
    }
}

/* Rotate a token's queries and key, and write its key and value to the cache. */
static void write_token(const Step *step, const Layer *layer, float *qkv, const int32_t *table, int64_t position) {
    const float *rotary = step->rotary + position * HEAD_DIM;
    float *key = qkv + HEADS * HEAD_DIM, *value = key + KV_HEADS * HEAD_DIM;
    int64_t column = position % BLOCK;
    for (int h = 0; h < HEADS; h++)
        turn(qkv + h * HEAD_DIM, layer->q_norm, rotary, 1.0f / sqrtf(HEAD_DIM), step->eps);
    for (int h = 0; h < KV_HEADS; h++) {
        float *keys = keys_of(layer, table[position / BLOCK], h);
        turn(key + h * HEAD_DIM, layer->k_norm, rotary, 1.0f, step->eps);
        for (int d = 0; d < HEAD_DIM; d++) keys[d * BLOCK + column] = key[h * HEAD_DIM + d];
        memcpy(keys + HALF + column * HEAD_DIM, value + h * HEAD_DIM, sizeof(float) * HEAD_DIM);
    }
}

/* Ask for the cache lines of `size` floats. In a batch of many sequences keys and values come from far away, in
 * pieces too small for the CPU to guess; asked for little by little between computations they arrive in time. */
static inline void fetch(const float *from, int size) {
    for (int i = 0; i < size; i += 16) __builtin_prefetch(from + i);
}

/* Scores of GROUP queries with `count` blocks' keys, one vector of tokens at a time. Fetches the blocks' values,
 * which are needed next, if they are `fresh`. */
static inline void score(
    const float *query, const float *const *keys, float *scores, int64_t width, const int count, const int fresh
) {
    for (int tile = 0; tile < TILES; tile++) {
        floats sums[4][GROUP] = {};
        for (int d = 0; d < HEAD_DIM; d++)
            for (int b = 0; b < count; b++) {
                if (fresh && tile == 0) fetch(keys[b] + HALF + d * BLOCK, BLOCK);
                for (int g = 0; g < GROUP; g++)
                    sums[b][g] += load(keys[b] + d * BLOCK + tile * LANES) * query[g * HEAD_DIM + d];
            }
        for (int b = 0; b < count; b++)
            for (int g = 0; g < GROUP; g++) store(scores + g * width + b * BLOCK + tile * LANES, sums[b][g]);
    }
}

/* Turn `context` scores into weights that sum to 1; the rest of the last block becomes 0. */
static inline void softmax(float *scores, int64_t context, int64_t padded) {
    for (int64_t i = context; i < padded; i++) scores[i] = -INFINITY;
    floats highest = load(scores), total = all(0.0f);
    for (int64_t i = LANES; i < padded; i += LANES) highest = larger(highest, load(scores + i));
    float top = largest(highest);
    for (int64_t i = 0; i < padded; i += LANES) {
        floats weight = exponential(load(scores + i) - top);
        store(scores + i, weight);
        total += weight;
    }
    floats scale = all(1.0f / sum(total));
    for (int64_t i = 0; i < padded; i += LANES) store(scores + i, load(scores + i) * scale);
}

/* Vectors of the head summed at once: as many as fit the registers beside GROUP. */
#define CHUNK (PARTS % 8 == 0 && GROUP == 1 ? 8 : PARTS % 4 == 0 && GROUP <= 3 ? 4 : PARTS % 2 == 0 && GROUP <= 6 ? 2 : 1)

/* Attention of the GROUP query heads of one kv head, for one token that sees `context` tokens.
 * Meanwhile fetches the keys of `next_blocks` blocks of `next`, the sequence that comes after. */
static inline void attend_group(
    const Step *step, const Layer *layer, const int32_t *table, int head, const float *query, float *out,
    int64_t context, const int fresh, const int32_t *next, int64_t next_blocks
) {
    float *scores = step->scratch;
    int64_t width = step->scratch_width, blocks = (context + BLOCK - 1) / BLOCK, b = 0;
    for (; b + 4 <= blocks; b += 4) {
        const float *keys[4];
        for (int i = 0; i < 4; i++) keys[i] = keys_of(layer, table[b + i], head);
        score(query, keys, scores + b * BLOCK, width, 4, fresh);
    }
    for (; b < blocks; b++) {
        const float *keys[1] = {keys_of(layer, table[b], head)};
        score(query, keys, scores + b * BLOCK, width, 1, fresh);
    }
    for (int g = 0; g < GROUP; g++) softmax(scores + g * width, context, blocks * BLOCK);
    for (int part = 0; part < PARTS; part += CHUNK) {
        floats sums[GROUP][CHUNK] = {};
        for (b = 0; b < blocks; b++) {
            const float *values = keys_of(layer, table[b], head) + HALF + part * LANES;
            const float *soon = part == 0 && b < next_blocks ? keys_of(layer, next[b], head) : NULL;
            int64_t filled = context - b * BLOCK < BLOCK ? context - b * BLOCK : BLOCK;
            for (int64_t t = 0; t < filled; t++) {
                if (soon) fetch(soon + t * HEAD_DIM, HEAD_DIM);
                for (int g = 0; g < GROUP; g++)
                    for (int c = 0; c < CHUNK; c++)
                        sums[g][c] += load(values + t * HEAD_DIM + c * LANES) * scores[g * width + b * BLOCK + t];
            }
        }
        for (int g = 0; g < GROUP; g++)
            for (int c = 0; c < CHUNK; c++) store(out + g * HEAD_DIM + (part + c) * LANES, sums[g][c]);
    }
}

/* Blocks of the next sequence fetched while one is computed; more would push each other out of the cache. */
#define FETCHED 16

/* qkv [tokens, WIDTH] is overwritten; out is [tokens, HEADS * HEAD_DIM]. */
void attend(const Step *step, const Layer *layer, float *qkv, float *out) {
    for (int64_t s = 0; s < step->sequences; s++) {
        const int32_t *table = step->tables + step->rows[s] * step->table_width, *next = table;
        int64_t first = step->offsets[s], count = step->offsets[s + 1] - first, start = step->starts[s], ahead = 0;
        if (s + 1 < step->sequences) {
            next = step->tables + step->rows[s + 1] * step->table_width;
            ahead = (step->starts[s + 1] + BLOCK) / BLOCK;
            ahead = ahead < FETCHED ? ahead : FETCHED;
        }
        for (int64_t t = 0; t < count; t++) write_token(step, layer, qkv + (first + t) * WIDTH, table, start + t);
        for (int h = 0; h < KV_HEADS; h++)
            for (int64_t t = 0; t < count; t++) {
                const float *query = qkv + (first + t) * WIDTH + h * GROUP * HEAD_DIM;
                float *to = out + ((first + t) * HEADS + h * GROUP) * HEAD_DIM;
                int64_t following = t == count - 1 ? ahead : 0;
                if (t == 0) attend_group(step, layer, table, h, query, to, start + 1, 1, next, following);
                else attend_group(step, layer, table, h, query, to, start + t + 1, 0, next, following);
            }
    }
}

/* Elements i … i+7 of a row; -inf beyond its end. */
static inline floats part(const float *row, int64_t i, int64_t size) {
    if (i + LANES <= size) return load(row + i);
    floats rest = all(-INFINITY);
    for (int j = 0; i + j < size; j++) rest[j] = row[i + j];
    return rest;
}

static int64_t largest_of(const float *row, int64_t size, float *top) {
    floats highest = all(-INFINITY);
    for (int64_t i = 0; i < size; i += LANES) highest = larger(highest, part(row, i, size));
    *top = largest(highest);
    int64_t at = 0;
    while (at < size - 1 && row[at] != *top) at++;
    return at;
}

/* The index at which the running sum of weights exp((row - top) / temperature) passes noise times its whole. */
static int64_t draw_plain(const float *row, int64_t size, float top, float temperature, float noise) {
    float warmth = 1.0f / temperature;
    double total = 0.0, reached = 0.0;
    for (int64_t i = 0; i < size; i += LANES) total += sum(exponential((part(row, i, size) - top) * warmth));
    double target = noise * total;
    int64_t chosen = 0;
    for (int64_t i = 0; i < size; i += LANES) {
        floats weights = exponential((part(row, i, size) - top) * warmth);
        double after = reached + sum(weights);
        if (after > target) {
            for (int j = 0; j < LANES && reached <= target; j++) {
                reached += weights[j];
                if (weights[j] > 0.0f) chosen = i + j;
            }
            return chosen;
        }
        reached = after;
    }
    return chosen;
}

typedef struct {
    float weight;
    int32_t token;
} Pair;

static inline int before(Pair a, Pair b) { return a.weight > b.weight || (a.weight == b.weight && a.token < b.token); }

/* Restore the heap below `at`: every pair comes before those at 2i+1 and 2i+2. */
static void sift(Pair *heap, int64_t size, int64_t at) {
    Pair moved = heap[at];
    for (int64_t child; (child = 2 * at + 1) < size; at = child) {
        if (child + 1 < size && before(heap[child + 1], heap[child])) child++;
        if (!before(heap[child], moved)) break;
        heap[at] = heap[child];
    }
    heap[at] = moved;
}

/* The same among the likeliest tokens only, from the likeliest down. They leave a heap one by one, for as long
 * as the cuts ask for more, and collect behind it. */
static int64_t draw_truncated(
    const float *row, int64_t size, float top, float temperature, float noise, int64_t top_k, float top_p, float min_p,
    Pair *pairs
) {
    float warmth = 1.0f / temperature;
    double total = 0.0, reached = 0.0, share = 0.0;
    int64_t count = 0, taken = 0;
    for (int64_t i = 0; i < size; i += LANES) {
        floats weights = exponential((part(row, i, size) - top) * warmth);
        for (int j = 0; j < LANES && i + j < size; j++)
            if (weights[j] > 0.0f && weights[j] >= min_p) {
                pairs[count++] = (Pair){weights[j], (int32_t)(i + j)};
                total += weights[j];
            }
    }
    for (int64_t i = count / 2 - 1; i >= 0; i--) sift(pairs, count, i);
    /* Without top_k the whole is known and top_p says when to stop; with it the first k make the whole. */
    int64_t wanted = top_k < count ? top_k : count;
    while (taken < wanted && (top_k < count || share < top_p * total)) {
        Pair first = pairs[0];
        pairs[0] = pairs[count - 1 - taken];
        pairs[count - 1 - taken] = first;
        taken++;
        share += first.weight;
        sift(pairs, count - taken, 0);
    }
    if (top_k < count) {
        double whole = share;
        int64_t kept = 0;
        for (share = 0.0; kept < taken && (kept == 0 || share < top_p * whole); kept++)
            share += pairs[count - 1 - kept].weight;
        taken = kept;
    }
    double target = noise * share;
    for (int64_t i = 0; i < taken; i++) {
        reached += pairs[count - 1 - i].weight;
        if (reached > target) return pairs[count - 1 - i].token;
    }
    return pairs[count - taken].token;
}

/* top_k, top_p, min_p and pairs are NULL when no row is truncated. */
void draw(
    const float *logits, const float *temperatures, const float *noise, const int64_t *top_k, const float *top_p,
    const float *min_p, Pair *pairs, int64_t *tokens, int64_t rows, int64_t size
) {
    for (int64_t i = 0; i < rows; i++) {
        const float *row = logits + i * size;
        float top;
        tokens[i] = largest_of(row, size, &top);
        if (temperatures[i] == 0.0f) continue;
        if (pairs && (top_k[i] < size || top_p[i] < 1.0f || min_p[i] > 0.0f))
            tokens[i] = draw_truncated(row, size, top, temperatures[i], noise[i], top_k[i], top_p[i], min_p[i], pairs);
        else tokens[i] = draw_plain(row, size, top, temperatures[i], noise[i]);
    }
}
