"""The stock vLLM servers that write the student's completions, and its weights on them.

Weights come through vLLM's own weight transfer, see `student_trainer.rollouts.transfer`.
"""

from __future__ import annotations

import logging
import secrets
from concurrent.futures import wait
from functools import partial
from typing import Any, Self

import httpx
import torch
import torch.distributed as dist

from shared.errors import ConfigurationError, RolloutError, RolloutServerError
from student_trainer.model.merging import adapts_tied_weights
from student_trainer.rollouts.adapters import StudentAdapters, send_adapter, servers_obstacle
from student_trainer.rollouts.drift import (
    DRIFT_TOLERANCE,
    PROBE_TOKENS,
    completion_logprobs,
    probe_prompt,
)
from student_trainer.rollouts.http import (
    GENERATE,
    ServerOptions,
    at_once,
    only_choice,
    wait_for_servers,
)
from student_trainer.rollouts.server_rollouts import ServerRollouts
from student_trainer.rollouts.transfer import ServerControl, Transfer, open_transfer
from student_trainer.rollouts.weights import StudentWeights
from student_trainer.runtime.ranks import from_all_ranks, from_first_rank
from student_trainer.runtime.threads import in_thread

logger = logging.getLogger(__name__)

_Probe = tuple[list[int], list[float]]  # token ids that a server wrote, and their log-probs

_ATTEMPTS = 3  # one may meet a server that dies, the next another
_LEAVE_SECONDS = 5.0
_PROBE_SECONDS = 60.0


class RolloutServers:
    """The vLLM servers of a run and their weights; use it in a ``with`` block.

    All ranks have one each. They call `sync` together; requests of one go out alone.

    Args:
        model: the student, as it is called in training (a peft model too), not in DDP. It may be
            sharded by FSDP2 or ZeRO-3.
        options: how to reach them.
        dtype: dtype of the servers' weights, such as "bfloat16".
        longest: longest prompt and completion together, in tokens.

    Attributes:
        live: addresses that took part in the last transfer, and have answered since.
        adapter: the name by which servers hold the student's adapters; None if its weights are
            sent with adapters added to them.
        drift: largest mean difference in log-prob to the trainer after the last `sync`.
        sent_bytes: size of what the last `sync` sent to each server.
        version: of the weights that the servers have; None if they may have others.
        label: the name of those weights on the servers: another one in each run, so that a server
            which another run uses too is noticed.

    Raises:
        ConfigurationError: adapters change one of two tied weights, which servers hold as one.
    """

    def __init__(self, model: Any, options: ServerOptions, *, dtype: str, longest: int) -> None:
        self.model = model
        self.options = options
        self.dtype = dtype
        self.longest = longest
        self.live: list[str] = []
        self.adapter: str | None = None
        self.drift: float | None = None
        self.sent_bytes: int | None = None
        self.version: int | None = None
        self.label = ""
        self._weights = StudentWeights(model, getattr(torch, dtype))
        if adapts_tied_weights(self._weights.causal_lm):
            raise ConfigurationError(
                "--rollout_url: adapters change the output layer or the embedding, which this "
                "model ties and a server holds once; leave them out of --lora_target_modules"
            )
        adapted = bool(self._weights.adapted)
        self._adapters = (
            StudentAdapters(model, self._weights, self._weights.dtype) if adapted else None
        )
        self._said_merged = False  # why all weights of a student with adapters are sent
        self._alone = False  # adapters are sent without the model that they change
        self._has_base = False  # the servers have that model
        self._refusal: str | None = None  # why they did not load adapters
        self._told_to_end = False
        self._away: set[str] = set()  # addresses of which it was said
        self._run: str | None = None
        self._control: ServerControl | None = None
        self._transfer: Transfer | None = None
        self._joined: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the group of the transfer; the servers run on."""
        control, self._control = self._control, None
        transfer, self._transfer = self._transfer, None
        adapter, self.adapter = self.adapter, None
        self._joined, self._has_base = {}, False
        # A group is left at once only by its last member, but a server that still waits for
        # weights hears of nothing before this process has left.
        left = None
        if control is not None:
            left = in_thread(partial(_leave, control, self._run, adapter), name="leave")
        if left is not None:
            wait([left], timeout=_LEAVE_SECONDS)
        if transfer is not None:
            transfer.close()
        if left is not None and control is not None:
            wait([left], timeout=_LEAVE_SECONDS if self._told_to_end else None)
            control.close()

    def wait_no_longer(self) -> None:
        """End a wait for a server in `sync`, now or later: for a signal's handler."""
        self._told_to_end = True

    def sync(self, weight_version: int) -> None:
        """Send the student's present weights to all servers that answer, unless they have them.

        A server that was away and is back takes part again. One that fails meanwhile is left out,
        and the transfer is repeated for the others.

        Raises:
            RolloutServerError: no server answers in time, weights reach none, or the run was told
                to end meanwhile.
            RolloutError: the log-probs of one differ from the trainer's by more than rounding.
        """
        if weight_version == self.version:
            return
        self.version = None
        if self._run is None:
            self._run = from_first_rank(secrets.token_hex(4))
        self.label = f"{self._run}-{weight_version}"
        for _ in range(_ATTEMPTS):
            failure = self._try_to_send()
            if failure is None:
                break
            logger.warning("weights did not reach all rollout servers: %s", failure)
        else:
            raise RolloutServerError(
                f"weights did not reach the rollout servers in {_ATTEMPTS} attempts ({failure}); "
                "start the servers again, with this student"
            )
        drifts = self._measure_drifts()
        for url, drift in drifts.items():
            if not drift <= DRIFT_TOLERANCE[self.dtype]:
                raise RolloutError(
                    f"log-probs of the rollout server {url} differ by {drift:.2g} from the "
                    "trainer's own after new weights: does it serve this student, as --dtype "
                    f"{self.dtype}?"
                )
        self.drift = max(drifts.values())
        self.version = weight_version

    def rollouts(self, **options: Any) -> ServerRollouts:
        """Return a rollout engine that generates here; the arguments are those of its class."""
        return ServerRollouts(self, **options)

    def lose(self, url: str, reason: object) -> None:
        """Send a server no more requests until the next transfer, as it failed."""
        if url in self.live:
            logger.warning("rollout server %s is lost: %s", url, reason)
            self.live = [other for other in self.live if other != url]
            self._away.add(url)

    def _try_to_send(self) -> str | None:
        """Send the weights to all servers that answer; return what failed meanwhile, or None."""
        failure: Exception | None = None
        answering: dict[str, str] = {}
        if _rank() == 0:
            try:
                answering = wait_for_servers(self.options, self.longest, lambda: self._told_to_end)
                self._tell_away(answering)
            except RolloutError as error:
                failure = error
        answering, failure = from_first_rank((answering, failure))
        if failure is not None:
            raise failure
        for attempt in (
            partial(self._join, answering), self._send, self._send_adapters, self._send_refused
        ):  # fmt: skip
            try:
                attempt()
            except (RolloutError, RuntimeError, ValueError) as error:
                failure = error
            failed = [text for text in from_all_ranks(str(failure or "")) if text]
            if failed:
                self.close()
                return failed[0]
        self.live = list(answering)
        self._joined = dict.fromkeys(answering, self.label)
        return None

    def _tell_away(self, answering: dict[str, str]) -> None:
        """Log which servers do not answer, and which do so again."""
        away = set(self.options.urls) - answering.keys()
        for url in sorted(away - self._away):
            logger.warning("rollout server %s does not answer; the run goes on without it", url)
        for url in sorted(self._away - away):
            logger.warning("rollout server %s is back", url)
        self._away = away

    def _send(self) -> None:
        """Send all weights, unless only adapters have changed since the servers got them."""
        self.sent_bytes = None
        if self._alone and self._has_base:
            return
        if self._control is not None:
            self._control.version = f"{self._run}-base" if self._alone else self.label
        assert self._transfer is not None
        self._weights.merged = not self._alone
        self._transfer.send()
        self._has_base = self._alone
        self.sent_bytes = self._weights.size

    def _send_adapters(self) -> None:
        """Send the adapters alone, if the servers load them."""
        self._refusal = None
        if not self._alone:
            return
        assert self._adapters is not None
        file = self._adapters.file()
        if self._control is not None:
            self._refusal = send_adapter(
                self._control, file, self._adapters.config,
                run=str(self._run), name=self.label, before=self.adapter,
            )  # fmt: skip
        self.adapter = self.label
        self.sent_bytes = (self.sent_bytes or 0) + len(file)

    def _send_refused(self) -> None:
        """Send all weights, as the servers did not load the adapters."""
        refusal = from_first_rank(self._refusal)
        if refusal is not None:
            if self._control is not None:
                self._control.drop_adapter(str(self._run), self.label)
            self._send_merged(refusal)
            self._send()

    def _send_merged(self, why: str) -> None:
        """Add the adapters to all weights that are sent from now on."""
        if not self._said_merged and _rank() == 0:
            logger.warning("all weights are sent to the rollout servers, not adapters: %s", why)
        self._said_merged, self._alone, self.adapter = True, False, None

    def _choose(self, answering: dict[str, str]) -> None:
        """Find out whether adapters can go alone to these servers."""
        self._alone = False
        if self._adapters is None:
            return
        why = self._adapters.obstacle
        if why is None and _rank() == 0:
            why = servers_obstacle(answering, self.options, self._adapters.rank)
        why = from_first_rank(why)
        self._alone = why is None
        if why is not None:
            self._send_merged(why)

    def _join(self, answering: dict[str, str]) -> None:
        """Form a group with these servers, unless there is one.

        One whose weights are not those of the last transfer has left the group: it was started
        again, or joined that of another run.
        """
        if answering != self._joined or self._transfer is None:
            self.close()
            self._choose(answering)
            if _rank() == 0:
                self._control = ServerControl(
                    list(answering),
                    seconds=self.options.seconds,
                    headers=self.options.headers,
                    told_to_end=lambda: self._told_to_end,
                )
                self._control.join_anew()
                if self.options.transfer == "gloo":
                    self._control.prepare_cpu()
            self._transfer = open_transfer(
                self.options.transfer, self._weights, self._control, seconds=self.options.seconds
            )

    def _measure_drifts(self) -> dict[str, float]:
        """Return the mean difference in log-prob between each server and the trainer.

        Raises:
            RolloutServerError: none answers any more.
        """
        prompt = probe_prompt(self.model, self.longest)
        tokens = min(PROBE_TOKENS, self.longest - len(prompt))
        probes: dict[str, _Probe] = {}
        failure: Exception | None = None
        if _rank() == 0:
            calls = [partial(self._try_probe, url, prompt, tokens) for url in self.live]
            answers: list[_Probe | RolloutServerError] = []
            try:
                answers = at_once(calls, lambda: self._told_to_end)
            except RolloutServerError as error:
                failure = error
            for url, answer in zip(self.live, answers, strict=bool(answers)):
                if isinstance(answer, RolloutServerError):
                    failure = answer
                    logger.warning("%s", answer)
                else:
                    probes[url] = answer
        probes, failure = from_first_rank((probes, failure))
        if not probes and failure is not None:
            raise failure
        self.live = list(probes)
        drifts = {}
        own: dict[tuple[int, ...], torch.Tensor] = {}  # replicas write the same, but for rounding
        for url, (written, theirs) in probes.items():
            key = tuple(written)
            if key not in own:
                own[key] = completion_logprobs(self.model, prompt, written)
            drifts[url] = float((own[key] - torch.tensor(theirs)).abs().mean())
        return drifts

    def _try_probe(self, url: str, prompt: list[int], tokens: int) -> _Probe | RolloutServerError:
        try:
            return self._probe(url, prompt, tokens)
        except RolloutServerError as error:
            return error

    def _probe(self, url: str, prompt: list[int], tokens: int) -> _Probe:
        """Return token ids that a server writes, and their log-probs.

        Raises:
            RolloutServerError: it does not answer, or not with these.
        """
        params = {"max_tokens": tokens, "seed": 0, "logprobs": 0, "detokenize": False}
        body = {"token_ids": prompt, "sampling_params": params, "model": self.adapter}
        headers = self.options.headers
        try:
            choice = only_choice(
                httpx.post(f"{url}/{GENERATE}", json=body, headers=headers, timeout=_PROBE_SECONDS)
            )
            logprobs = [float(row["logprob"]) for row in choice["logprobs"]["content"]]
            written = [int(token) for token in choice["token_ids"]]
        except (httpx.HTTPError, RolloutError, KeyError, TypeError, ValueError) as error:
            why = str(error) or type(error).__name__
            raise RolloutServerError(
                f"rollout server {url} does not answer a probe: {why}"
            ) from error
        if not written or len(written) != len(logprobs):
            raise RolloutServerError(
                f"rollout server {url} answered a probe with {len(written)} tokens and "
                f"{len(logprobs)} log-probs"
            )
        return written, logprobs


def _leave(control: ServerControl, run: str | None, adapter: str | None) -> None:
    if run is not None and adapter is not None:
        control.drop_adapter(run, adapter)
    control.join_anew()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
