"use strict";
const H = 72, TALL = 6e6, PAGE = 50, KEPT = 60, EVERY = 1000, BUSY = 250;  // px a row, px a list may be high, rows asked for at once, pages kept, ms, ms
const ME = crypto.getRandomValues(new Uint32Array(2)).join("-");  // this page: a search of its ends when it looks at something else
const $ = id => document.getElementById(id);
const RANGES = [["tokens", "Tokens"], ["prompt_tokens", "Prompt tokens"], ["length", "Characters"], ["time", "Seconds"], ["reward", "Reward"]];
let state = null, query = {source: "rows"}, total = 0, epoch = null, settled = false, searching = false;
let picked = null, generation = 0, shown = null, unfolded = true, rawOpen = false;

// -- numbers and nodes ----------------------------------------------------------------------------------------------
const whole = v => v.toLocaleString("en-GB");
const digits = v => v >= 100 || Number.isInteger(v) ? whole(Math.round(v)) : Math.abs(v) >= 10 ? v.toFixed(1).replace(/\.0$/, "") : v.toFixed(2).replace(/\.?0+$/, "");
function scaled(v, units) { let at = 0; while (v >= 999.5 && at < units.length - 1) { v /= 1000; at++; } return digits(v) + units[at]; }
const count = v => v == null ? "–" : v < 1e4 ? digits(v) : scaled(v, ["", " k", " M", " G"]);
const bytes = v => scaled(v, [" B", " kB", " MB", " GB", " TB"]);
const seconds = v => v == null ? "–" : v < 0.9995 ? `${digits(v * 1000)} ms` : v < 120 ? `${digits(v)} s` : `${digits(v / 60)} min`;
const reward = v => v == null ? "–" : Math.abs(v) < 1e9 ? String(Math.round(v * 1e4) / 1e4) : v.toPrecision(4);
function html(name, classes, text) {
  const made = document.createElement(name);
  if (classes) made.className = classes;
  if (text != null) made.textContent = text;
  return made;
}
function node(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text != null) made.textContent = text;
  return made;
}
function button(classes, text, act) { const made = html("button", classes, text); made.type = "button"; made.addEventListener("click", act); return made; }
const tagClass = name => `tag ${name === "length" ? "length" : ["abort", "error", "not a row", "content_filter"].includes(name) || query.source === "failures" ? "bad" : ""}`;

// -- asking ---------------------------------------------------------------------------------------------------------
async function ask(what, parameters = {}, signal) {
  const answer = await fetch(`api/${what}?${new URLSearchParams(parameters)}`, {signal});
  if (!answer.ok) throw Object.assign(new Error((await answer.json()).error.message), {status: answer.status});
  return what === "raw" ? answer.text() : answer.json();
}

// -- the list: only what is seen is in the page ---------------------------------------------------------------------
const list = $("list"), pane = $("pane"), pages = new Map();  // page number → {items, total} | {promise}
let top_ = 0, last = 0, idle = 0, drawn = 0;
const height = () => total * H, most = () => Math.max(0, height() - list.clientHeight);
const squeezed = () => height() > TALL;
const toScroll = t => squeezed() ? t / most() * (TALL - list.clientHeight) : t;
function anchor() { last = toScroll(top_); list.scrollTop = last; last = list.scrollTop; }
list.addEventListener("scroll", () => {
  const now = list.scrollTop, step = now - last;
  if (Math.abs(step) < 0.5) return;
  last = now;
  if (!squeezed()) top_ = now;
  else if (now <= 0) top_ = 0;
  else if (now >= TALL - list.clientHeight - 1) top_ = most();
  else if (Math.abs(step) <= list.clientHeight) top_ = Math.max(0, Math.min(most(), top_ + step));
  else top_ = now / (TALL - list.clientHeight) * most();
  clearTimeout(idle);
  if (squeezed()) idle = setTimeout(anchor, 200);
  draw();
}, {passive: true});
function draw() { if (!drawn) drawn = requestAnimationFrame(() => { drawn = 0; paint(); }); }
const slots = new Map();  // place in the list → its element
function paint() {
  const room = list.clientHeight, from = Math.max(0, Math.floor(top_ / H) - 2), to = Math.min(total, Math.ceil((top_ + room) / H) + 2);
  for (const [place, element] of slots) if (place < from || place >= to) { element.remove(); slots.delete(place); }
  for (let place = from; place < to; place++) {
    let element = slots.get(place);
    if (!element) { element = html("div", "item wait"); element.setAttribute("role", "option"); element.dataset.place = place; slots.set(place, element); pane.append(element); }
    element.style.transform = `translateY(${Math.round(place * H - top_)}px)`;
    fill(element, itemAt(place));
  }
  want(from, to);
}
function itemAt(place) { return pages.get(Math.floor(place / PAGE))?.items?.[place % PAGE]; }
function fill(element, item) {
  element.setAttribute("aria-selected", item != null && item.n === picked);
  if (element.item === item && item) return;
  element.item = item;
  if (!item) { element.className = "item wait"; element.replaceChildren(html("div", "top", "…")); return; }
  element.className = "item";
  const top = html("div", "top");
  top.append(html("b", "", item.id ?? `row ${whole(item.n)}`));
  for (const name of item.finish) if (name !== "stop") top.append(html("span", tagClass(name), name));
  if (item.reward != null) top.append(html("span", "", `reward ${reward(item.reward)}`));
  if (item.tokens != null) top.append(html("span", "", `${count(item.tokens)} tok`));
  if (item.samples > 1) top.append(html("span", "", `×${item.samples}`));
  element.replaceChildren(top, html("div", "say", item.readable ? item.text || "(no prompt)" : "This line is not a JSON object."));
}
let asked = 0, wanting = null;
function want(from, to) {
  clearTimeout(wanting);
  const missing = [];
  for (let page = Math.floor(from / PAGE); page * PAGE < to; page++) {
    const kept = pages.get(page);
    if (!kept || kept.items && kept.items.length < Math.min(PAGE, total - page * PAGE) && !kept.asking) missing.push(page);
  }
  if (missing.length) wanting = setTimeout(() => missing.forEach(load), pages.size ? 40 : 0);
}
async function load(page) {
  const kept = pages.get(page) ?? {}, mine = asked;
  kept.asking = true;
  pages.set(page, kept);
  while (pages.size > KEPT) pages.delete(pages.keys().next().value);
  try {
    const answer = await ask("rows", {...query, first: page * PAGE, count: PAGE});
    if (mine !== asked) return;
    kept.items = answer.items;
    draw();
  } catch { pages.delete(page); } finally { kept.asking = false; }
}
function resize() {
  $("space").style.height = `${Math.min(height(), TALL)}px`;
  top_ = Math.min(top_, most());
  if (squeezed()) anchor();
  draw();
}
new ResizeObserver(() => { draw(); if (shown && !$("board").hidden) drawBoard(); }).observe(list);
function forget() { asked++; pages.clear(); draw(); }
function bring(place) {
  if (place * H < top_) top_ = place * H;
  else if ((place + 1) * H > top_ + list.clientHeight) top_ = (place + 1) * H - list.clientHeight;
  top_ = Math.max(0, Math.min(most(), top_));
  anchor();
  draw();
}
list.addEventListener("click", event => { const item = event.target.closest(".item")?.item; if (item) pick(item.n, 0); });

// -- what is looked at ----------------------------------------------------------------------------------------------
let looking = 0, delay = null;
async function look() {  // how many rows fit, and whether the search goes on
  clearTimeout(delay);
  const mine = ++looking;
  try {
    const answer = await ask("rows", {...query, page: ME});
    if (mine !== looking) return;
    $("wrong").textContent = "";
    const grown = answer.total !== total, moved = epoch != null && answer.epoch !== epoch;
    epoch = answer.epoch;
    total = answer.total;
    searching = answer.searching;
    settled = true;
    if (moved || grown && (query.sort || query.down)) forget();
    if (grown || moved) resize();
    $("scan").textContent = searching ? `searching ${Math.floor(100 * answer.searched / Math.max(1, answer.size))} %` : "";
  } catch (error) {
    if (mine !== looking) return;
    searching = false;
    if (error.status === 400) { $("wrong").textContent = error.message; total = 0; settled = false; $("scan").textContent = ""; forget(); resize(); }
  }
  $("cancel").hidden = !searching;
  told();
  delay = setTimeout(look, searching || state && !state.current ? BUSY : EVERY);
}
const filtered = () => Object.keys(query).some(key => !["source", "sort", "down"].includes(key));
function told() {
  const all = state ? query.source === "rows" ? state.rows : state.failures : 0;
  $("total").textContent = !settled ? "" : filtered() ? `${whole(total)} of ${whole(all)}` : query.source === "rows" ? `${whole(total)} rows` : `${whole(total)} failures`;
  $("clear").hidden = !filtered();
  let empty = pane.querySelector(".empty");
  const text = settled && total === 0 && state?.current && !searching ? filtered() ? "Nothing fits." : query.source === "rows" ? "No rows yet." : "Nothing has failed." : "";
  if (!empty) { empty = html("div", "empty"); pane.append(empty); }
  empty.textContent = text;
  empty.hidden = !text;
}
function change(given, keep = false) {  // a new query; undefined takes a key out
  query = Object.fromEntries(Object.entries({...query, ...given}).filter(([, value]) => value !== undefined && value !== ""));
  total = 0; epoch = null; settled = false; top_ = 0; last = 0; list.scrollTop = 0;
  if (!keep) showQuery();
  forget();
  resize();
  look();
}
const narrow = given => change({...(query.source === "rows" ? {} : emptied()), source: "rows", ...given});  // the charts are of the rows
function showQuery() {
  $("text").value = query.text ?? "";
  $("where").value = query.where ?? "all";
  $("regex").setAttribute("aria-pressed", !!query.regex);
  $("sort").value = query.sort ?? "position";
  $("down").setAttribute("aria-pressed", !!query.down);
  for (const [name] of RANGES) for (const end of ["min", "max"]) $(`${name}_${end}`).value = query[`${name}_${end}`] ?? "";
  listFinishes();
  for (const each of $("sources").children) each.setAttribute("aria-pressed", each.dataset.source === query.source);
}
let typing = null;
$("text").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(() => change({text: $("text").value}, true), 250); });
$("where").addEventListener("change", () => change({where: $("where").value === "all" ? undefined : $("where").value}));
$("regex").addEventListener("click", () => change({regex: query.regex ? undefined : "true"}));
$("sort").addEventListener("change", () => { const sort = $("sort").value; change({sort: sort === "position" ? undefined : sort, down: sort === "position" ? undefined : "true"}); });
$("down").addEventListener("click", () => change({down: query.down ? undefined : "true"}));
$("fold").addEventListener("click", () => { $("more").hidden = !$("more").hidden; $("fold").setAttribute("aria-expanded", !$("more").hidden); $("fold").setAttribute("aria-pressed", !$("more").hidden); resize(); });
$("tools").addEventListener("submit", event => { event.preventDefault(); clearTimeout(typing); change({text: $("text").value}); });
const emptied = () => Object.fromEntries(Object.keys(query).filter(key => key !== "source").map(key => [key, undefined]));
$("clear").addEventListener("click", () => change({...emptied(), sort: query.sort, down: query.down}));
$("cancel").addEventListener("click", () => change({text: undefined, regex: undefined}));
for (const each of $("sources").children) each.addEventListener("click", () => { change({...emptied(), source: each.dataset.source}); close(); });
{
  const finish = html("select"), label = html("label", "", "Finish");
  finish.id = "finish"; label.htmlFor = "finish";
  finish.addEventListener("change", () => change({finish: finish.value}));
  $("more").append(label, finish);
  for (const [name, title] of RANGES) {
    $("more").append(html("span", "", title));
    for (const end of ["min", "max"]) {
      const input = html("input");
      Object.assign(input, {id: `${name}_${end}`, type: "number", step: "any", placeholder: end});
      input.setAttribute("aria-label", `${title}, ${end === "min" ? "least" : "most"}`);
      input.addEventListener("change", () => change({[`${name}_${end}`]: input.value}));
      $("more").append(input);
    }
  }
}
function listFinishes() {
  const names = state ? query.source === "rows" ? state.finishes : state.failure_names : [], finish = $("finish");
  const wanted = ["", ...new Set([...names, ...(query.finish ? [query.finish] : [])])];
  if (wanted.join("\n") !== [...finish.options].map(option => option.value).join("\n"))
    finish.replaceChildren(...wanted.map(name => { const option = html("option", "", name || "any"); option.value = name; return option; }));
  finish.value = query.finish ?? "";
}

// -- one trace ------------------------------------------------------------------------------------------------------
function link() { history.replaceState(null, "", `#${query.source === "rows" ? "row" : "failed"}=${picked}${generation ? `&gen=${generation}` : ""}`); }
async function pick(n, number, place) {
  picked = n; generation = number; rawOpen = false;
  document.body.classList.add("reading");
  link();
  draw();
  if (place != null) bring(place);
  try {
    const row = await ask("row", {n, source: query.source});
    if (picked !== n) return;
    shown = row;
    generation = Math.min(generation, Math.max(0, row.samples.length - 1));
    $("right").scrollTop = 0;
    drawDetail();
  } catch (error) {
    if (picked !== n) return;
    shown = null;
    $("detail").replaceChildren(back(), html("div", "notice", error.message));
  }
  $("board").hidden = true;
  $("detail").hidden = false;
}
function close() {
  picked = shown = null;
  document.body.classList.remove("reading");
  history.replaceState(null, "", location.pathname + location.search);
  $("detail").hidden = true; $("board").hidden = false;
  drawBoard();
  draw();
}
const back = () => { const made = button("plain", "← List", close); made.classList.add("back"); return made; };
function drawDetail() {
  const row = shown, parts = [], head = html("div", "head");
  head.append(back(), html("h2", "", row.id ?? `row ${whole(row.n)}`), html("span", "small", `${row.id == null ? "" : `row ${whole(row.n)} · `}${bytes(row.bytes)}`));
  head.append(button("plain", rawOpen ? "Hide JSON" : "JSON", () => { rawOpen = !rawOpen; drawDetail(); }));
  parts.push(head);
  if (!row.readable) parts.push(html("div", "notice", "This line of the file is not a JSON object."));
  if (row.failure) parts.push(html("div", "notice", `${row.failure.error}${row.failure.status ? ` ${row.failure.status}` : ""}${row.failure.index == null ? "" : ` · sample ${row.failure.index}`}: ${row.failure.message}`));
  for (const message of row.messages) {
    const card = html("div", `card message ${["user", "system", "assistant"].includes(message.role) ? message.role : ""}`);
    card.append(html("h3", "", message.role), html("div", "body", message.text));
    parts.push(card);
  }
  if (row.samples.length > 1) parts.push(tabs(row));
  if (row.samples.length) parts.push(sampleCard(row.samples[generation], row.samples.length === 1));
  if (row.columns.length) parts.push(fields("Columns", row.columns));
  if (row.samples.length && row.samples[generation].metadata.length) parts.push(fields("How it was made", row.samples[generation].metadata));
  if (rawOpen) { const pre = html("pre", "card", "…"); pre.id = "raw"; parts.push(pre); ask("raw", {n: row.n, source: query.source}).then(text => { pre.textContent = text; }, error => { pre.textContent = error.message; }); }
  const keys = html("div", "keys");
  for (const [key, what] of [["j", "next"], ["k", "previous"], ["n", "next generation"], ["r", "fold reasoning"], ["/", "search"], ["Esc", "charts"]]) { keys.append(html("kbd", "", key), ` ${what}   `); }
  parts.push(keys);
  $("detail").replaceChildren(...parts);
}
function tabs(row) {
  const bar = html("div", "tabs");
  bar.setAttribute("role", "tablist");
  row.samples.forEach((sample, i) => {
    const tab = button("tab", String(i + 1), () => turn(i));
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-selected", i === generation);
    if (sample.finish && sample.finish !== "stop") tab.append(html("span", tagClass(sample.finish), sample.finish));
    if (sample.reward != null) tab.append(html("span", "tag", reward(sample.reward)));
    bar.append(tab);
  });
  return bar;
}
function turn(i) { generation = i; link(); drawDetail(); }
function sampleCard(sample, alone) {
  const card = html("article", "card"), numbers = html("div", "numbers");
  card.id = "sample";
  if (alone) card.style.marginTop = "16px";
  const tell = (name, value, classes) => { const span = html("span", "", `${name} `); span.append(html("b", classes ?? "", value)); numbers.append(span); };
  tell("finish", sample.finish ?? "–", sample.finish === "length" ? "warn" : sample.finish && sample.finish !== "stop" ? "bad" : "");
  if (sample.reward != null) tell("reward", reward(sample.reward));
  if (sample.tokens != null) tell("tokens", whole(sample.tokens));
  if (sample.prompt_tokens != null) tell("prompt tokens", whole(sample.prompt_tokens));
  if (sample.time != null) tell("time", seconds(sample.time));
  if (sample.speed != null) tell("speed", `${count(sample.speed)} tokens/s`);
  tell("characters", whole(sample.length));
  card.append(numbers);
  if (sample.reasoning != null) {
    const part = html("div", "part think"), body = html("div", "body", sample.reasoning);
    const fold = button("", `Reasoning · ${whole(sample.reasoning.length)} characters`, () => { unfolded = !unfolded; drawDetail(); });
    fold.setAttribute("aria-expanded", unfolded);
    body.hidden = !unfolded;
    part.append(fold, body);
    card.append(part);
  }
  const part = html("div", "part");
  if (sample.reasoning != null) part.append(html("h3", "", "Answer"));
  part.append(html("div", "body", sample.answer || "(empty)"));
  card.append(part);
  return card;
}
function fields(title, pairs) {
  const card = html("div", "card fields"), dl = html("dl");
  for (const [name, value] of pairs) dl.append(html("dt", "", name), html("dd", "", value));
  card.append(html("h2", "", title), dl);
  return card;
}

// -- charts ---------------------------------------------------------------------------------------------------------
const LEFT = 44, RIGHT = 6, UPPER = 8, LOWER = 20, TALLNESS = 150;
function ticks(top, n = 3) {
  if (!(top > 0)) top = 1;
  const raw = top / n, power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].find(k => k * power >= raw * 0.999) * power, found = [];
  for (let v = 0; v < top + step * 0.999; v += step) found.push(v);
  return found;
}
function frame(title, note) {
  const card = html("div", "card chart"), svg = node("svg", {role: "img", "aria-label": `${title}: ${note}`});
  card.append(html("h2", "", title), html("div", "note", note), svg);
  return {card, svg};
}
function levels(svg, top, width, show) {
  const scale = ticks(top), high = scale.at(-1), y = v => TALLNESS - LOWER - (TALLNESS - LOWER - UPPER) * v / high;
  for (const v of scale) {
    const at = Math.round(y(v)) + 0.5;
    svg.append(node("line", {class: "grid", x1: LEFT, x2: width - RIGHT, y1: at, y2: at}), node("text", {x: LEFT - 7, y: at + 4, "text-anchor": "end"}, show(v)));
  }
  return y;
}
function bars(title, note, bins, color, width, show, choose) {  // bins: [{low, high, n}]; marks under the bars where a bin begins
  const {card, svg} = frame(title, note), y = levels(svg, Math.max(...bins.map(bin => bin.n)), width, count);
  const step = (width - LEFT - RIGHT) / bins.length, every = Math.ceil(bins.length / Math.max(2, Math.floor((width - LEFT) / 58)));
  bins.forEach((bin, i) => {
    const x = LEFT + i * step, top = y(bin.n), made = node("rect", {class: "bar pick", x: x + 0.5, width: Math.max(1, step - 1), y: bin.n ? Math.min(top, TALLNESS - LOWER - 1.5) : top, height: Math.max(bin.n ? 1.5 : 0, TALLNESS - LOWER - top), rx: 1.5});
    made.style.fill = color;
    made.append(node("title", {}, `${show(bin.low)}${bin.high !== bin.low ? ` to ${show(bin.high)}` : ""}: ${whole(bin.n)}`));
    made.addEventListener("click", () => choose(bin));
    svg.append(made);
    if (i % every === 0 && (x + step / 2 < width - 20 || bins.length < 3)) svg.append(node("text", {x: x + step / 2, y: TALLNESS - 5, "text-anchor": "middle"}, show(bin.low)));
  });
  return card;
}
function logBins(counts, perDecade) {
  let from = counts.findIndex(n => n), to = counts.length - 1;
  while (!counts[to]) to--;
  const group = Math.max(1, Math.ceil((to - from + 1) / 36)), bins = [];
  const edge = i => i < 1 ? 0 : Math.ceil(10 ** ((i - 1) / perDecade) - 1e-9);
  for (let i = from; i <= to; i += group) {
    const low = edge(i), high = Math.max(low, edge(i + group) - 1), n = counts.slice(i, i + group).reduce((a, b) => a + b, 0);
    if (low === bins.at(-1)?.low || high < low) { bins.at(-1).n += n; continue; }
    if (bins.length && bins.at(-1).high >= low) { bins.at(-1).n += n; bins.at(-1).high = Math.max(high, bins.at(-1).high); continue; }
    bins.push({low, high, n});
  }
  return bins;
}
function valueBins(pairs) {
  if (pairs.length <= 24) return pairs.map(([value, n]) => ({low: value, high: value, n}));
  const low = pairs[0][0], span = (pairs.at(-1)[0] - low) || 1, bins = Array.from({length: 24}, (_, i) => ({low: low + span * i / 24, high: low + span * (i + 1) / 24, n: 0}));
  for (const [value, n] of pairs) bins[Math.min(23, Math.floor((value - low) / span * 24))].n += n;
  return bins;
}
function finishes(pairs, all) {
  const card = html("div", "card chart"), rows = html("div", "bars"), most = pairs[0]?.[1] ?? 1;
  for (const [name, n] of pairs.slice(0, 6)) {
    const line = button("", "", () => narrow({finish: name})), track = html("span", "track"), bar = html("i");
    bar.style.width = `${100 * n / most}%`;
    if (name !== "stop") bar.style.background = name === "length" ? "var(--warn)" : "var(--bad)";
    track.append(bar);
    line.append(html("em", "", name), track, html("span", "", `${whole(n)} · ${digits(100 * n / all)} %`));
    rows.append(line);
  }
  card.append(html("h2", "", "Finish reasons"), html("div", "note", "click one to see its rows"), rows);
  return card;
}
function line(title, note, values, color, width) {
  const {card, svg} = frame(title, note), y = levels(svg, Math.max(...values), width, count), base = TALLNESS - LOWER;
  const x = i => LEFT + (width - LEFT - RIGHT) * (values.length > 1 ? i / (values.length - 1) : 0.5);
  const path = values.map((v, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${y(v).toFixed(1)}`).join("") + "h.01";
  const area = node("path", {class: "area", d: `${path}L${x(values.length - 1).toFixed(1)} ${base}L${x(0).toFixed(1)} ${base}Z`}), stroke = node("path", {class: "series", d: path});
  area.style.fill = stroke.style.stroke = color;
  svg.append(area, stroke, node("text", {x: LEFT, y: TALLNESS - 5}, "first to finish"), node("text", {x: width - RIGHT, y: TALLNESS - 5, "text-anchor": "end"}, "last"));
  return card;
}
function drawBoard() {
  if (!state || $("board").hidden) return;
  const c = state.charts, tiles = html("div", "tiles"), charts = html("div", "charts");
  const tile = (title, value, more) => { const card = html("div", "card tile"); card.append(html("h2", "", title), html("div", "value", value), html("div", "more", more ?? "")); tiles.append(card); };
  tile("Rows", count(state.rows), state.growth?.rows ? `${count(state.growth.rows)} a second now` : bytes(state.size));
  tile("Samples", count(c.samples), c.rows ? `${digits(c.samples / c.rows)} a row` : "");
  tile("Tokens out", count(c.completion_tokens), state.growth?.tokens ? `${count(state.growth.tokens)} a second now` : c.samples ? `${count(c.completion_tokens / c.samples)} a sample` : "");
  tile("Tokens in", count(c.prompt_tokens), c.samples ? `${count(c.prompt_tokens / c.samples)} a sample` : "");
  const scored = c.rewards.reduce((a, [, n]) => a + n, 0);
  if (scored) tile("Mean reward", reward(c.rewards.reduce((a, [v, n]) => a + v * n, 0) / scored), `${whole(scored)} samples`);
  if (state.failures) tile("Failed", count(state.failures), "see Failed");
  const right = $("right"), style = getComputedStyle(right), inside = Math.min(1120, right.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight));
  const columns = Math.max(1, Math.floor((inside + 12) / 332)), width = Math.max(200, (inside - 12 * (columns - 1)) / columns - 32);
  const any = counts => counts.some(n => n);
  if (any(c.completion)) charts.append(bars("Completion tokens", `${count(c.completion_tokens / c.samples)} on average; click to filter`, logBins(c.completion, c.per_decade), "var(--c1)", width, count, bin => narrow({tokens_min: bin.low, tokens_max: bin.high})));
  if (c.finish.length) charts.append(finishes(c.finish, c.finish.reduce((a, [, n]) => a + n, 0)));
  if (c.rewards.length) charts.append(bars("Reward", "click to filter: a row's is the mean of its samples'", valueBins(c.rewards), "var(--c5)", width, reward, bin => narrow({reward_min: bin.low - 5e-5, reward_max: bin.high + 5e-5})));
  if (any(c.prompt)) charts.append(bars("Prompt tokens", `${count(c.prompt_tokens / c.samples)} on average; click to filter`, logBins(c.prompt, c.per_decade), "var(--c2)", width, count, bin => narrow({prompt_tokens_min: bin.low, prompt_tokens_max: bin.high})));
  if (c.speed.length) {
    const alone = charts.childElementCount % columns === 0, card = line("Tokens per second of a request", `in the order of finishing, means of ${whole(c.speed_step)}`, c.speed, "var(--c6)", alone ? inside - 32 : width);
    if (alone) card.style.gridColumn = "1 / -1";
    charts.append(card);
  }
  const keys = html("div", "keys");
  for (const [key, what] of [["j", "first trace"], ["/", "search"]]) keys.append(html("kbd", "", key), ` ${what}   `);
  const way = html("div", "head back");
  way.append(back());
  $("board").replaceChildren(way, tiles, charts, keys);
}

// -- the file -------------------------------------------------------------------------------------------------------
let pictured = "";
async function watch() {
  const dot = $("live").firstElementChild, says = $("live").lastElementChild;
  try {
    state = await ask("state");
    $("file").textContent = state.file;
    $("file").title = state.path;
    document.title = `${state.file} – penstock`;
    const growing = state.growth != null && state.growth.rows > 0, part = state.size ? state.indexed / state.size : 1, indexing = !state.current && part < 0.999;
    $("facts").textContent = [`${whole(state.rows)} rows`, bytes(state.size), ...(state.failures ? [`${whole(state.failures)} failures`] : []), ...(state.torn ? [`last line not whole yet (${bytes(state.torn)})`] : []), ...(state.problem ? [state.problem] : [])].join(" · ");
    dot.className = `dot ${state.problem ? "down" : indexing ? "busy" : growing ? "grow" : ""}`;
    says.textContent = state.problem ? "cannot be read" : indexing ? `indexing ${Math.floor(100 * part)} %` : growing ? `growing, ${count(state.growth.rows)} rows/s` : "up to date";
    $("progress").firstElementChild.style.width = indexing ? `${100 * part}%` : "0";
    $("sources").lastElementChild.textContent = state.failures ? `Failed ${whole(state.failures)}` : "Failed";
    const picture = JSON.stringify([state.charts, state.rows, state.failures, growing]);
    if (picture !== pictured && !(document.querySelector("#board .bar:hover") && state.current)) { pictured = picture; drawBoard(); }
    listFinishes();
    told();
  } catch {
    dot.className = "dot down";
    says.textContent = "the viewer has ended";
  }
  setTimeout(watch, state && !state.current ? BUSY : EVERY);
}

// -- keys and links -------------------------------------------------------------------------------------------------
async function step(by) {
  if (!total) return;
  let place = picked == null ? by > 0 ? -1 : total : [...slots].find(([, element]) => element.item?.n === picked)?.[0] ?? null;
  if (place == null) place = (await ask("rows", {...query, place_of: picked})).place ?? -1;
  place = Math.max(0, Math.min(total - 1, place + by));
  bring(place);
  let item = itemAt(place);
  if (!item) { await load(Math.floor(place / PAGE)); item = itemAt(place); }
  if (item) await pick(item.n, 0);
}
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
  if (event.key === "Escape") { if (typing) event.target.blur(); else if (picked != null) close(); return; }
  if (typing) return;
  const samples = shown?.samples.length ?? 0;
  if (event.key === "j" || event.key === "ArrowDown" && event.target === list) step(1);
  else if (event.key === "k" || event.key === "ArrowUp" && event.target === list) step(-1);
  else if (event.key === "n" && samples) turn((generation + 1) % samples);
  else if (event.key === "N" && samples) turn((generation + samples - 1) % samples);
  else if (event.key === "r" && samples) { unfolded = !unfolded; drawDetail(); }
  else if (event.key === "/") $("text").focus();
  else return;
  event.preventDefault();
});
$("overview").addEventListener("click", () => { close(); document.body.classList.add("reading"); drawBoard(); });
async function follow() {  // a link to a row
  const found = location.hash.match(/^#(row|failed)=(\d+)(?:&gen=(\d+))?$/);
  if (!found) { if (picked != null) close(); return; }
  const source = found[1] === "row" ? "rows" : "failures", n = Number(found[2]), number = Number(found[3] ?? 0);
  if (source !== query.source) change({...emptied(), source});
  if (n === picked && number === generation) return;
  await pick(n, number);
  const place = (await ask("rows", {...query, place_of: n}).catch(() => ({}))).place;
  if (place != null && picked === n) { await until(() => total > place); top_ = Math.max(0, place * H - list.clientHeight / 3); top_ = Math.min(top_, most()); anchor(); draw(); }
}
async function until(condition) { for (let i = 0; i < 50 && !condition(); i++) await new Promise(done => setTimeout(done, 100)); }
addEventListener("hashchange", follow);
showQuery();
watch();
look();
follow();
