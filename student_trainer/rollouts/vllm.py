"""The rollout engine that generates with a vLLM engine, which is given the student's weights.

vllm is imported only when an engine is made. The engine runs in its own processes; weights reach it
as a checkpoint in shared memory, through vLLM's own `reload_weights`.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict

from shared.errors import ConfigurationError, RolloutError
from shared.text import StopSearch
from shared.vllm_sampling import SeededSampling
from student_trainer.model.merging import adapts_tied_weights
from student_trainer.rollouts.base import (
    NO_FILTER,
    Rollout,
    RolloutRequest,
    StartSearch,
    TokenFilter,
    vllm_sampling,
)
from student_trainer.rollouts.drift import (
    DRIFT_TOLERANCE,
    PROBE_TOKENS,
    probe_prompt,
    trainer_logprobs,
)
from student_trainer.rollouts.weights import StudentWeights
from student_trainer.runtime.signals import ctrl_c_kept_from_children, signals_as_exits

_SHARED_MEMORY = Path("/dev/shm")
_LONGEST_STEP = 10.0  # seconds to wait for a thread in the engine; it never leaves a dead engine
_WATCH_SECONDS = 1.0
_EXTENSION = f"{SeededSampling.__module__}.{SeededSampling.__qualname__}"


class VllmEngine:
    """A vLLM engine beside the trainer, on the same device; use it in a ``with`` block.

    `run` may run in a thread while the student trains; when the block ends, it raises an error.

    Args:
        model: the unwrapped student (a peft model too: the engine gets merged weights). Not
            sharded.
        max_model_len: longest prompt and completion together, in tokens.
        dtype: dtype of the engine's weights, such as "bfloat16".
        gpu_memory_utilization: share of a GPU's memory for the engine; on a CPU, where vLLM is for
            trials, its cache is 1 GB (``VLLM_CPU_KVCACHE_SPACE``).
        max_num_seqs: completions at once; None for vLLM's default.

    Attributes:
        drift: mean difference in log-prob to the trainer after the last `sync`; None before it.

    Raises:
        ConfigurationError: vLLM does not take the model.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_model_len: int,
        dtype: str,
        gpu_memory_utilization: float = 0.3,
        max_num_seqs: int | None = None,
    ) -> None:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns at each reload
        # A fork would copy the locks of the teacher client's threads in whatever state they are.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform

        self.model = model
        self.dtype = dtype
        self.max_model_len = max_model_len
        self.drift: float | None = None
        self._version: int | None = None
        self._requests = 0
        self._closed = threading.Event()
        self._lock = threading.Lock()  # the engine is not safe for several threads
        self._folder = tempfile.TemporaryDirectory(
            prefix="student-weights-", dir=_weights_folder(model, getattr(torch, dtype))
        )
        try:
            with self._exported(), _rank_environment(), ctrl_c_kept_from_children():
                self._engine = LLMEngine.from_engine_args(
                    EngineArgs(
                        model=self._folder.name,
                        dtype=dtype,
                        max_model_len=max_model_len,
                        skip_tokenizer_init=True,
                        generation_config="vllm",  # not the checkpoint's own sampling defaults
                        gpu_memory_utilization=gpu_memory_utilization,
                        max_num_seqs=max_num_seqs,
                        worker_extension_cls=_EXTENSION,
                        enforce_eager=current_platform.is_cpu(),  # compiling takes minutes on a CPU
                        use_tqdm_on_load=False,
                        disable_log_stats=True,
                    )
                )
                self._engine.collective_rpc("spare_generators")
            threading.Thread(target=self._watch, name="vllm-watch", daemon=True).start()
        except Exception as error:  # an architecture or too little memory may raise anything
            self._folder.cleanup()
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigurationError(
                f"--rollout_engine vllm: vLLM does not start with this student: {reason}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine's processes."""
        self._closed.set()  # running requests end before their next token
        idle = self._lock.acquire(timeout=_LONGEST_STEP)
        try:
            self._engine.engine_core.shutdown()
        finally:
            if idle:
                self._lock.release()
        self._folder.cleanup()

    def sync(self, weight_version: int) -> None:
        """Give the engine the student's present weights, unless it has this version.

        It sets ``drift``, measured on a few tokens.

        Raises:
            RolloutError: the drift is more than rounding, so the engine does not have these
                weights; or the engine is dead.
        """
        if weight_version == self._version:
            return
        with self._exported(), self._exclusive_engine():
            place = {"weights_path": self._folder.name}
            self._engine.collective_rpc("reload_weights", kwargs=place)
            if not self._engine.reset_prefix_cache():  # it holds keys and values of old weights
                raise RolloutError("vLLM did not drop its prefix cache after new weights")
        self.drift = self._measure_drift()
        if not self.drift <= DRIFT_TOLERANCE[self.dtype]:
            raise RolloutError(
                f"vLLM's log-probs differ by {self.drift:.2g} from the trainer's own after new "
                "weights; use --rollout_engine transformers"
            )
        self._version = weight_version

    def rollouts(self, **options: Any) -> VllmRollouts:
        """Return a rollout engine that generates here; the arguments are those of its class."""
        return VllmRollouts(self, **options)

    def run(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[Any],
        searches: Sequence[StopSearch] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Yield (index of the prompt, vLLM's `CompletionOutput`), each when it is finished.

        Args:
            searches: searches for strings that end a completion too, which then has no
                ``finish_reason``. The engine has no tokenizer, so they run here, after each token;
                ``params`` must ask for ``CUMULATIVE`` outputs.

        Raises:
            RolloutError: the engine is dead, or was closed meanwhile.
        """
        from vllm.inputs import tokens_input

        running: dict[str, int] = {}
        known = [0] * len(prompts)  # tokens that were searched already
        try:
            for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
                name = f"rollout-{self._requests}"
                self._requests += 1
                with self._exclusive_engine():
                    self._engine.add_request(name, tokens_input(prompt), param)
                running[name] = index
            while running:
                with self._exclusive_engine():
                    outputs = self._engine.step()
                for output in outputs:
                    written, name = output.outputs[0], output.request_id
                    index, ended = running[name], output.finished
                    if searches is not None and not ended:
                        new = written.token_ids[known[index] :]
                        known[index] += len(new)
                        if any(map(searches[index].add, new)):
                            ended = True
                            with self._exclusive_engine():
                                self._engine.abort_request([name])
                    if ended:
                        del running[name]
                        yield index, written
        except GeneratorExit:  # the caller stopped iterating
            with suppress(RolloutError), self._exclusive_engine():
                self._engine.abort_request(list(running))
            raise

    @contextmanager
    def _exclusive_engine(self) -> Iterator[None]:
        """Give one thread at a time access to the engine within the block.

        Raises:
            RolloutError: the engine is closed or dead.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        with self._lock:
            if self._closed.is_set():
                raise RolloutError("vLLM was closed before its completions were written")
            try:
                yield
            except EngineDeadError as error:
                raise RolloutError("vLLM's engine is dead; its log is above") from error

    def _watch(self) -> None:
        """Raise an error in threads that wait for a dead engine, as vLLM's client does not."""
        from vllm.v1.engine.exceptions import EngineDeadError

        core: Any = self._engine.engine_core
        while not self._closed.wait(_WATCH_SECONDS):
            if core.resources.engine_dead:
                core.outputs_queue.put_nowait(EngineDeadError())
                for answer in list(core.utility_results.values()):
                    answer.set_exception(EngineDeadError())
                return

    def _measure_drift(self) -> float:
        from vllm import SamplingParams

        prompt = probe_prompt(self.model, self.max_model_len)
        tokens = min(PROBE_TOKENS, self.max_model_len - len(prompt))
        params = SamplingParams(max_tokens=tokens, seed=0, logprobs=0, detokenize=False)
        [(_, written)] = self.run([prompt], [params])
        ids = torch.tensor(written.token_ids)
        theirs = torch.tensor(
            [row[i].logprob for row, i in zip(written.logprobs, ids.tolist(), strict=True)]
        )
        rows = trainer_logprobs(self.model, [*prompt, *ids.tolist()])
        ours = rows[len(prompt) - 1 : -1]  # [T, V]
        return float((ours.gather(1, ids[:, None])[:, 0] - theirs).abs().mean())

    @contextmanager
    def _exported(self) -> Iterator[None]:
        """Write the weights into the folder, and delete them after the block.

        They fill shared memory as large as the model, so they are deleted on a signal too.
        """
        with signals_as_exits():
            try:
                self._export()
                yield
            finally:
                for file in Path(self._folder.name).glob("*.safetensors*"):
                    file.unlink()

    def _export(self) -> None:
        """Write the weights as a checkpoint, under the names that transformers saves them by.

        ``save_pretrained`` writes on the first rank only, but each rank has its own engine.
        """
        weights = StudentWeights(self.model, getattr(torch, self.dtype))
        causal_lm = weights.causal_lm
        config = copy.deepcopy(causal_lm.config)
        config.architectures = [type(causal_lm).__name__]
        if adapts_tied_weights(causal_lm):
            for part in (config, config.get_text_config()):
                part.tie_word_embeddings = False
        config.save_pretrained(self._folder.name)
        save_torch_state_dict(
            {n: w.cpu() for n, w in weights}, self._folder.name, max_shard_size="2GB"
        )


class VllmRollouts:
    """A rollout engine over a `VllmEngine`, which several of these may share.

    Args:
        engine: closed by the caller, not here.
        stop_ids: tokens that end a completion.
        max_new_tokens: longest completion.
        temperature: temperature of the sampling; 0 is greedy.
        vocab_size: number of ids that may be sampled; the output layer may have padding above.
        token_filter: the tokens that one is drawn from.
        stop_strings: starts a search for strings that end a completion too; the tokens that spell
            one are part of it.
    """

    elsewhere = True

    def __init__(
        self,
        engine: VllmEngine,
        *,
        stop_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        vocab_size: int,
        token_filter: TokenFilter = NO_FILTER,
        stop_strings: StartSearch | None = None,
    ) -> None:
        self.engine = engine
        self._stops = stop_strings
        output_size = engine.model.get_output_embeddings().weight.shape[0]
        self._params = vllm_sampling(
            stop_ids=stop_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            token_filter=token_filter,
            padding=range(vocab_size, output_size),
        )

    def sync(self, weight_version: int) -> None:
        """Load the student's present weights, as `RolloutEngine.sync` says."""
        self.engine.sync(weight_version)

    def generate(self, requests: Sequence[RolloutRequest]) -> Iterator[list[tuple[int, Rollout]]]:
        """Yield groups of (index of the request, rollout), as `RolloutEngine.generate` says.

        Raises:
            RolloutError: the engine is dead, or ended a completion for an unknown reason.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind as Kind

        params = [
            SamplingParams(
                **self._params,
                seed=request.seed,
                output_kind=Kind.FINAL_ONLY if self._stops is None else Kind.CUMULATIVE,
            )
            for request in requests
        ]
        prompts = [request.prompt_ids.tolist() for request in requests]
        ends = ("stop", "length") if self._stops is None else ("stop", "length", None)
        searches = None if self._stops is None else [self._stops(prompt) for prompt in prompts]
        for index, written in self.engine.run(prompts, params, searches):
            if written.finish_reason not in ends:
                raise RolloutError(f"vLLM ended a completion with {written.finish_reason!r}")
            ids = np.asarray(written.token_ids, np.uint32)
            yield [(index, Rollout(ids, truncated=written.finish_reason == "length"))]


def _weights_folder(model: Any, dtype: torch.dtype) -> Path | None:
    """Return the shared-memory folder if the weights fit there, or None for the default folder.

    Containers often have 64 MB. All ranks of this machine send weights at the same time.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed = 1.1 * ranks * dtype.itemsize * sum(p.numel() for p in model.parameters())
    if _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > needed:
        return _SHARED_MEMORY
    return None


@contextmanager
def _rank_environment() -> Iterator[None]:
    """Show processes started in the block only this rank's GPU and no variables of the launcher.

    Otherwise vLLM takes the first GPU, and torch connects to torchrun's store. Without a GPU they
    compile nothing: vLLM's sampler would compile one small function for ten seconds.
    """
    before = dict(os.environ)
    for name in before:
        if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE") or name.startswith(
            ("MASTER_", "TORCHELASTIC_", "GROUP_")
        ):
            del os.environ[name]
    if torch.cuda.is_available():
        visible = before.get("CUDA_VISIBLE_DEVICES", "").split(",")
        mine = torch.cuda.current_device()
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[mine] if visible != [""] else str(mine)
    else:
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    try:
        yield
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        os.environ.pop("TORCH_COMPILE_DISABLE", None)
        os.environ.update(before)
