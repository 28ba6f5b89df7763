"""The flags of `penstock generate` that say what is asked: prompts, samples, functions of the user's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, arg

from penstock.batch.generation import GenerationSettings, LengthPolicy
from penstock.errors import ConfigError
from penstock.prompt import PromptFormat, Template, read_template
from penstock.sample import SamplingParams


@dataclass(frozen=True)
class PromptArgs:
    """How a row becomes a conversation."""

    prompt_column: str | None = "prompt"
    """Column with the prompt: text, or a list of chat messages. None: rows of a --rollout that have none."""
    id_column: Annotated[str | None, arg(aliases=("--uuid-column",))] = None
    """Column that names a row. Default: a hash of the row's content."""
    prompt_template: str | None = None
    """The user message, with {prompt} and any {column} of the row in it."""
    prompt_template_file: Path | None = None
    """The same in a file; Jinja where its name ends in .jinja, .jinja2 or .j2."""
    system_prompt: str | None = None
    """Put before every conversation."""

    def form(self) -> PromptFormat:
        """Raises ConfigError for a template that cannot be read."""
        template = None
        if self.prompt_template is not None and self.prompt_template_file is not None:
            raise ConfigError("Give --prompt-template or --prompt-template-file, not both.")
        if self.prompt_template is not None:
            template = Template(self.prompt_template)
        elif self.prompt_template_file is not None:
            template = read_template(self.prompt_template_file)
        return PromptFormat(
            prompt_column=self.prompt_column,
            id_column=self.id_column,
            template=template,
            system_prompt=self.system_prompt,
        )


@dataclass(frozen=True)
class SampleArgs:
    """How a sample is made of it."""

    num_generations: Annotated[int, arg(aliases=("-n",))] = 1
    """Samples of each row; a later run of the same job may ask for more."""
    rollout: str | None = None
    """module:function or file.py:function, an `async def rollout(row, client)` that makes a sample in as many
    requests as it likes. Default: one chat completion."""
    validate: str | None = None
    """module:function, called with (sample, row): True, False or the reason of a rejection; a sample that is
    rejected is made again."""
    max_validate_attempts: int = 3
    """Samples made until one is accepted; then it has failed, as SampleRejected."""
    length_policy: LengthPolicy = "keep"
    """A sample that was cut off at --max-tokens is kept, gone on with (continue), or left out of its row
    (drop)."""
    max_continues: int = 3
    """Times a sample is gone on with, --max-tokens more each time."""
    sampling: OmitArgPrefixes[SamplingParams] = field(default_factory=SamplingParams)

    def settings(self, model: str | None) -> GenerationSettings:
        return GenerationSettings(
            model=model,
            params=self.sampling,
            rollout=self.rollout,
            validate=self.validate,
            max_validate_attempts=self.max_validate_attempts,
            length_policy=self.length_policy,
            max_continues=self.max_continues,
        )
