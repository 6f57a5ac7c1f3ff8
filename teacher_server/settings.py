"""The settings of `teacher-server serve`, checked before the model loads."""

from __future__ import annotations

import math
import ssl
from dataclasses import dataclass, fields
from functools import cached_property
from importlib.util import find_spec
from ipaddress import ip_address
from typing import Literal

from shared.errors import ConfigurationError
from shared.model_names import describe_missing, existing, models_below
from teacher_server.adapters import LoraModule, lora_modules
from teacher_server.engine_flags import check_engine_flags

BackendName = Literal["auto", "transformers", "vllm"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Settings:
    """The flags of `serve`; times in seconds, sizes in tokens unless said otherwise.

    Raises:
        ConfigurationError: a value that cannot work, a certificate that does not load, or a path
            that is no model folder.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: str | None = None
    allow_unauthenticated: bool = False
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    backend: BackendName = "auto"
    dtype: DtypeName = "auto"
    device: DeviceName = "auto"
    served_model_name: str | None = None
    lora_modules: tuple[str, ...] = ()
    trust_remote_code: bool = False
    max_model_len: int | None = None
    max_batch_tokens: int = 16_384
    max_queued_tokens: int = 1_048_576
    max_held_mib: int = 2048
    max_request_tokens: int = 262_144
    max_request_bytes: int = 64 << 20
    max_top_k: int = 1024
    score_chunk_mib: int = 128
    request_timeout: float = 600.0
    drain_timeout: float = 30.0
    log_requests: bool = False
    # vLLM's own flags as given: ("--tensor-parallel-size", "2", …)
    engine_flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "max_batch_tokens",
            "max_queued_tokens",
            "max_held_mib",
            "max_request_tokens",
            "max_request_bytes",
            "max_top_k",
            "score_chunk_mib",
            "request_timeout",
            "drain_timeout",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigurationError(
                    f"{_flag(name)} {getattr(self, name)} must be above 0 and finite"
                )
        if not 0 <= self.port <= 65_535:
            raise ConfigurationError(f"--port {self.port} must be from 0 to 65535")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigurationError(f"--max-model-len {self.max_model_len} must be at least 2")
        if self.max_request_tokens > self.max_queued_tokens:
            raise ConfigurationError(
                f"--max-request-tokens {self.max_request_tokens} is over --max-queued-tokens "
                f"{self.max_queued_tokens}: such a request could never be admitted"
            )
        largest = self.max_request_bytes + _largest_answer_bytes()
        if self.max_held_mib << 20 < largest:
            raise ConfigurationError(
                f"--max-held-mib {self.max_held_mib} must be at least {-(-largest >> 20)}: a "
                f"request of --max-request-bytes {self.max_request_bytes} and its answer take that"
            )
        self._check_tls()
        self._check_backend()
        self._check_model()
        _ = self.adapters  # checked now

    @property
    def name(self) -> str:
        """The name of the base model, by which requests may call it."""
        return self.served_model_name or self.model

    @cached_property
    def adapters(self) -> tuple[LoraModule, ...]:
        """The adapters of ``lora_modules``."""
        return lora_modules(self.lora_modules, self.name)

    @property
    def loopback(self) -> bool:
        """The reach of ``host``: True if only processes of this machine reach it."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def engine(self) -> Literal["transformers", "vllm"]:
        """The backend to run; ``auto`` stands for vLLM where it is installed."""
        if self.backend != "auto":
            return self.backend
        return "vllm" if find_spec("vllm") is not None else "transformers"

    def _check_tls(self) -> None:
        if self.ssl_certfile is None:
            if self.ssl_keyfile is not None:
                raise ConfigurationError(f"--ssl-keyfile {self.ssl_keyfile} needs --ssl-certfile")
            return
        given = f"--ssl-certfile {self.ssl_certfile}"
        if self.ssl_keyfile is not None:
            given += f" --ssl-keyfile {self.ssl_keyfile}"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:  # an empty password keeps OpenSSL from asking for one at the terminal
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile, password="")
        except OSError as error:  # ssl.SSLError included
            raise ConfigurationError(
                f"{given}: {error.strerror or error}; give PEM files of a certificate, its chain "
                "included, and of its private key, without a password"
            ) from error

    def _check_backend(self) -> None:
        given = [flag.split("=")[0].replace("_", "-") for flag in self.engine_flags]
        if "--api-key" in given:  # the message must not show the key
            raise ConfigurationError(
                "--api-key: what stands in a command line is seen by every user of the machine; "
                "use --api-key-file, or TEACHER_API_KEYS"
            )
        if self.backend == "vllm" and find_spec("vllm") is None:
            raise ConfigurationError(
                "--backend vllm: vllm is not installed here; pip install 'sparse-gkd[vllm]', or "
                "use --backend transformers"
            )
        check_engine_flags(
            self.engine_flags, self.engine, [_flag(one.name) for one in fields(self)]
        )

    def _check_model(self) -> None:
        folder = existing(self.model)
        if folder is not None and folder.is_dir():
            if (folder / "config.json").exists():
                return
            if (folder / "adapter_config.json").exists():
                raise ConfigurationError(
                    f"{self.model} holds LoRA adapters only; merge them into their base model: "
                    f"student-trainer merge --model_name_or_path {self.model} --output_dir DIR; or "
                    f"serve the base model with --lora-modules NAME={self.model}"
                )
            raise ConfigurationError(
                f"{self.model} has no config.json{models_below(folder)}; give a model folder"
            )
        if missing := describe_missing(self.model, owner=True):
            raise ConfigurationError(f"{missing}; give a model folder or a Hub id such as org/name")


def _largest_answer_bytes() -> int:
    """Return the memory of the largest answer while it is made.

    That is two copies of 8 bytes a log-prob and its id.
    """
    from shared.protocol import Limits  # imported here, so that --help does not wait for numpy

    return 16 * Limits().max_logprobs


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
