"""How an engine is reached over HTTP. Nothing heavy is imported here."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Settings of the HTTP side; names are vLLM's where vLLM has them."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free port; the ready line says which."""
    served_model_name: tuple[str, ...] = ()
    """Names clients may use; answers carry the first. None given: the model's path."""
    api_key: tuple[str, ...] = ()
    """Keys of which clients of /v1 must send one. None given: VLLM_API_KEY; that empty: no key is needed."""
    shutdown_timeout: float = 2.0
    """Seconds that requests in flight have to finish after SIGTERM or SIGINT."""
    enable_prompt_tokens_details: bool = False
    """Say in `usage` how many prompt tokens came from the prefix cache."""

    def api_keys(self) -> tuple[str, ...]:
        """The keys given, else the environment's; a key on the command line can be seen by other users."""
        return tuple(filter(None, self.api_key or (os.environ.get("VLLM_API_KEY", ""),)))
