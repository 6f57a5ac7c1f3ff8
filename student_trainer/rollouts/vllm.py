"""The rollout engine that generates with a vLLM engine, which is given the student's weights.

vllm is imported only when an engine is made. The engine runs in its own processes; weights reach it
one layer at a time, as files in shared memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from shared.errors import ConfigurationError, RolloutError
from shared.text import StopSearch
from student_trainer.rollouts.base import (
    NO_FILTER,
    Rollout,
    RolloutRequest,
    StartSearch,
    TokenFilter,
    proposed_ids,
    vllm_sampling,
)
from student_trainer.rollouts.drift import (
    DRIFT_TOLERANCE,
    PROBE_TOKENS,
    completion_logprobs,
    probe_prompt,
)
from student_trainer.rollouts.engine_environment import own_gpu, rank_environment
from student_trainer.rollouts.engine_group import EngineGroup
from student_trainer.rollouts.layer_files import LayerFiles
from student_trainer.rollouts.vllm_worker import StudentWorker
from student_trainer.rollouts.weights import StudentWeights
from student_trainer.runtime.ranks import from_all_ranks
from student_trainer.runtime.signals import ctrl_c_kept_from_children

_LONGEST_STEP = 10.0  # seconds to wait for a thread in the engine; it never leaves a dead engine
_WATCH_SECONDS = 1.0
_EXTENSION = f"{StudentWorker.__module__}.{StudentWorker.__qualname__}"
_Item = tuple[list[int], Any, StopSearch | None]  # prompt, `SamplingParams`, search for its end
_Probe = tuple[list[int], list[float]]  # token ids that the engine wrote, and their log-probs


class VllmEngine:
    """A vLLM engine beside the trainer, on the same devices; use it in a ``with`` block.

    All ranks make theirs together, and call `sync` and `run` equally often. Neighbouring ranks may
    share an engine, which then has their devices; the first of them leads it. `run` may run in a
    thread while the student trains; when the block ends, it raises an error.

    Args:
        model: the student, as it is called in training (a peft model too: the engine gets merged
            weights), not in DDP. It may be sharded by FSDP2 or ZeRO-3.
        max_model_len: longest prompt and completion together, in tokens.
        dtype: dtype of the engine's weights, such as "bfloat16".
        gpu_memory_utilization: share of a GPU's memory for the engine; on a CPU, where vLLM is for
            trials, its cache is 1 GB (``VLLM_CPU_KVCACHE_SPACE``).
        max_num_seqs: completions at once of each rank; None for vLLM's default.
        tensor_parallel_size: ranks that share an engine; it divides the ranks of each machine.
        sleeps: the engine's memory is freed whenever it has written all, until the next `sync`.

    Attributes:
        drift: largest mean difference in log-prob to the trainer after the last `sync`; None
            before it.

    Raises:
        ConfigurationError: vLLM does not take the model, or cannot sleep on this device.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_model_len: int,
        dtype: str,
        gpu_memory_utilization: float = 0.3,
        max_num_seqs: int | None = None,
        tensor_parallel_size: int = 1,
        sleeps: bool = False,
    ) -> None:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns at each reload
        # A fork would copy the locks of the teacher client's threads in whatever state they are.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        from vllm.platforms import current_platform

        if sleeps and not current_platform.is_sleep_mode_available():
            raise ConfigurationError(
                f"--vllm_enable_sleep_mode: vLLM cannot sleep on {current_platform.device_type}; "
                "drop it"
            )
        self.model = model
        self.dtype = dtype
        self.max_model_len = max_model_len
        self.drift: float | None = None
        self._version: int | None = None
        self._requests = 0
        self._sleeps, self._asleep = sleeps, False
        self._closed = threading.Event()
        self._lock = threading.Lock()  # the engine is not safe for several threads
        self._group = EngineGroup(tensor_parallel_size)
        self._files = LayerFiles(StudentWeights(model, getattr(torch, dtype)))
        self._engine: Any = None
        gpus = self._group.gather(own_gpu())
        failure: Exception | None = None
        if self._group.leads:
            options = {
                "dtype": dtype,
                "max_model_len": max_model_len,
                "gpu_memory_utilization": gpu_memory_utilization,
                "max_num_seqs": max_num_seqs and max_num_seqs * tensor_parallel_size,
                "tensor_parallel_size": tensor_parallel_size,
                "enable_sleep_mode": sleeps,
                "enforce_eager": current_platform.is_cpu(),  # compiling takes minutes on a CPU
            }
            try:
                self._start(gpus, options)
            except Exception as error:  # an architecture or too little memory may raise anything
                failure = error
        told = " ".join(str(failure).split()) or type(failure).__name__ if failure else ""
        reason = next(filter(None, from_all_ranks(told)), None)
        if reason is not None:
            if self._engine is not None:
                self.close()
            self._files.close()
            raise ConfigurationError(
                f"--rollout_engine vllm: vLLM does not start with this student: {reason}"
            ) from failure
        self._sleep()

    def _start(self, gpus: Sequence[str], options: dict[str, Any]) -> None:
        """Start the engine, with random weights, on these GPUs."""
        from vllm import EngineArgs, LLMEngine

        self._files.write_config()
        with rank_environment(gpus), ctrl_c_kept_from_children():
            self._engine = LLMEngine.from_engine_args(
                EngineArgs(
                    model=str(self._files.path),
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    generation_config="vllm",  # not the checkpoint's own sampling defaults
                    worker_extension_cls=_EXTENSION,
                    max_logprobs=-1,  # no limit
                    use_tqdm_on_load=False,
                    disable_log_stats=True,
                    **options,
                )
            )
            self._engine.collective_rpc("spare_generators")
        threading.Thread(target=self._watch, name="vllm-watch", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine's processes."""
        self._closed.set()  # running requests end before their next token
        idle = self._lock.acquire(timeout=_LONGEST_STEP)
        try:
            if self._engine is not None:
                self._engine.engine_core.shutdown()
        finally:
            if idle:
                self._lock.release()
        self._files.close()

    def sync(self, weight_version: int) -> None:
        """Give the engine the student's present weights, unless it has this version.

        It sets ``drift``, measured on a few tokens.

        Raises:
            RolloutError: the drift of an engine is more than rounding, so it does not have these
                weights; or an engine is dead.
        """
        if weight_version == self._version:
            return
        self._version = None
        probe: _Probe = ([], [])
        failure: RolloutError | None = None
        try:
            self._load()
            if self._group.leads:
                probe = self._probe()
        except RolloutError as error:  # told to all ranks first, which would wait for this one
            failure = error
        told = next(filter(None, from_all_ranks(str(failure or ""))), None)
        if told is not None:
            raise failure or RolloutError(told)
        probe = self._group.gather(probe)[0]
        self.drift = max(from_all_ranks(self._drift_of(*probe)))
        if not self.drift <= DRIFT_TOLERANCE[self.dtype]:
            raise RolloutError(
                f"vLLM's log-probs differ by {self.drift:.2g} from the trainer's own after new "
                "weights; use --rollout_engine transformers"
            )
        self._version = weight_version

    def _load(self) -> None:
        """Load the student's weights into the engine; the ranks gather them together.

        An engine that sleeps gets memory for its weights first, and for its cache once they are
        loaded: a layer that is gathered needs room too.

        Raises:
            RolloutError: the engine is dead.
        """
        if self._asleep:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # torch holds what it freed for the next training step
            self._group.gather(None)  # the engine wakes on the GPUs of all ranks that share it
        if not self._group.leads:
            self._files.send(None)
            return
        self._wake("weights")
        self._call("begin_weights")
        self._files.send(lambda file: self._call("load_weights_of", path=str(file)))
        self._call("finish_weights")
        self._wake("kv_cache")
        self._asleep = False
        with self._exclusive_engine():
            if not self._engine.reset_prefix_cache():  # it holds keys and values of old weights
                raise RolloutError("vLLM did not drop its prefix cache after new weights")

    def _call(self, method: str, **arguments: Any) -> None:
        """Call a method of `StudentWorker` in all workers."""
        with self._exclusive_engine():
            self._engine.collective_rpc(method, kwargs=arguments)

    def _wake(self, tag: str) -> None:
        if self._asleep:
            with self._exclusive_engine():
                self._engine.wake_up([tag])

    def _sleep(self) -> None:
        """Free the engine's memory, weights included, if it sleeps at all."""
        if not self._sleeps:
            return
        self._version = None
        if self._group.leads and not self._asleep:
            with self._exclusive_engine():
                self._engine.sleep(level=2)
        self._asleep = True

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

        Ranks that share an engine call it together; its leader runs the prompts of all.

        Args:
            searches: searches for strings that end a completion too, which then has no
                ``finish_reason``. The engine has no tokenizer, so they run here, after each token;
                ``params`` must ask for ``CUMULATIVE`` outputs.

        Raises:
            RolloutError: the engine is dead, or was closed meanwhile.
        """
        ends: Sequence[StopSearch | None] = searches or [None] * len(prompts)
        yield from self._group.spread(list(zip(prompts, params, ends, strict=True)), self._run)
        self._sleep()

    def _run(self, items: Sequence[_Item]) -> Iterator[tuple[int, Any]]:
        """Yield what `run` does, of the engine that this rank leads."""
        from vllm.inputs import tokens_input

        running: dict[str, int] = {}
        known = [0] * len(items)  # tokens that were searched already
        try:
            for index, (prompt, param, _) in enumerate(items):
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
                    search = items[index][2]
                    if search is not None and not ended:
                        new = written.token_ids[known[index] :]
                        known[index] += len(new)
                        if any(map(search.add, new)):
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

    def _probe(self) -> _Probe:
        """Return a few token ids that the engine writes, and their log-probs."""
        from vllm import SamplingParams

        prompt = probe_prompt(self.model, self.max_model_len)
        tokens = min(PROBE_TOKENS, self.max_model_len - len(prompt))
        params = SamplingParams(max_tokens=tokens, seed=0, logprobs=0, detokenize=False)
        [(_, written)] = self._run([(prompt, params, None)])
        ids = list(written.token_ids)
        return ids, [row[i].logprob for row, i in zip(written.logprobs, ids, strict=True)]

    def _drift_of(self, ids: list[int], theirs: list[float]) -> float:
        """Return the mean difference of a probe's log-probs to the trainer's own."""
        prompt = probe_prompt(self.model, self.max_model_len)
        ours = completion_logprobs(self.model, prompt, ids)
        return float((ours - torch.tensor(theirs)).abs().mean())


class VllmRollouts:
    """A rollout engine over a `VllmEngine`, which several of these may share.

    Args:
        engine: closed by the caller, not here.
        stop_ids: tokens that end a completion.
        max_new_tokens: longest completion.
        temperature: temperature of the sampling; 0 is greedy.
        vocab_size: number of ids that may be sampled; the output layer may have padding above.
        token_filter: the tokens that one is drawn from.
        student_top_m: ids that each rollout proposes at each position; 0 for none.
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
        student_top_m: int = 0,
        stop_strings: StartSearch | None = None,
    ) -> None:
        self.engine = engine
        self._student_top_m, self._vocab_size = student_top_m, vocab_size
        self._stops = stop_strings
        self._params = vllm_sampling(
            stop_ids=stop_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            token_filter=token_filter,
            student_top_m=student_top_m,
            vocab_size=vocab_size,
            output_size=engine.model.config.get_text_config().vocab_size,
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
            proposed = self._proposed(written.logprobs) if self._student_top_m else None
            yield [(index, Rollout(ids, written.finish_reason == "length", proposed))]

    def _proposed(self, logprobs: Sequence[Mapping[int, Any]]) -> NDArray[np.uint32]:
        """Return the ids [T, m] that are most probable by vLLM's candidates of each position."""
        most = self._params["logprobs"]  # vLLM tells one more if the sampled token is unlikely
        candidates = [
            [(id, one.logprob) for id, one in islice(row.items(), most)] for row in logprobs
        ]
        return proposed_ids(candidates, self._student_top_m, self._vocab_size)
