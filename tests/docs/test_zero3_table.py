"""The page's table of ZeRO-3 is what `benchmarks.zero3_rollouts` measured."""

import json

from tests.support.repository import ROOT

PAGE = (ROOT / "docs/how-to/rollout-servers.md").read_text()
FOUND = json.loads((ROOT / "docs/results/zero3_rollouts.json").read_text())


def test_the_table_is_what_was_measured():
    step, generating = FOUND["seconds_itself"], FOUND["generating_itself"]
    assert f"for each token | {step:.1f} | {generating:.1f} | |" in PAGE
    step, generating = FOUND["seconds_server"], FOUND["generating_server"]
    new = FOUND["syncing_server"]
    assert f"| a rollout server | {step:.1f} | {generating:.1f} | {new:.1f} |" in PAGE
    assert f"That is {FOUND['ratio']:.2f} times as fast." in PAGE
    assert not FOUND["quick"]
