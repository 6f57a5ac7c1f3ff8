"""Seconds that add up, and a trace that is valid at every moment."""

import json
from concurrent.futures import Future

from student_trainer.runtime.timeline import Timeline, Trace


def read(path):
    return json.loads(path.read_text())["traceEvents"]


def complete(path):
    return {event["name"]: event for event in read(path) if event["ph"] == "X"}


def test_the_outer_activitys_seconds_stand_still_while_the_inner_one_goes_on(monkeypatch):
    seconds, now = {}, iter([0, 1, 3, 10, 14, 20, 25, 31])  # each begin and end looks once
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    timeline = Timeline(lambda name, value: seconds.update({name: seconds.get(name, 0) + value}))
    timeline.begin_step(1)
    with timeline.during("forward_backward"), timeline.during("teacher"):
        pass
    timeline.begin("optimizer")
    timeline.end_step()  # ends what is open
    assert seconds == {
        "step": (1 - 0) + (20 - 14) + (31 - 25),
        "forward_backward": (3 - 1) + (14 - 10),
        "teacher": 10 - 3,
        "optimizer": 25 - 20,
    }


def test_the_trace_is_valid_json_before_the_first_event_and_after_each(tmp_path):
    path = tmp_path / "trace.json"
    timeline = Timeline(trace=Trace(path, (1, 1)))
    assert read(path) == []
    timeline.begin_step(1)
    for number in range(1, 4):
        with timeline.during("forward_backward", sequences=number):
            pass
        events = [event for event in read(path) if event["ph"] == "X"]
        assert [event["args"]["sequences"] for event in events] == list(range(1, number + 1))


def test_only_chosen_steps_are_traced(tmp_path):
    path = tmp_path / "trace.json"
    timeline = Timeline(trace=Trace(path, (2, 3)))
    for step in range(1, 6):
        timeline.begin_step(step)
        timeline.end_step()
    assert [e["args"]["step"] for e in read(path) if e["name"] == "step"] == [2, 3]


def test_requests_in_flight_at_once_have_lanes_of_their_own_and_lanes_are_used_again(tmp_path):
    path = tmp_path / "trace.json"
    timeline = Timeline(trace=Trace(path, (1, 1)))
    timeline.begin_step(1)
    answers = [Future() for _ in range(3)]
    timeline.request(answers[0], sequences=0)
    timeline.request(answers[1], sequences=1)
    answers[0].set_result(None)
    timeline.request(answers[2], sequences=2)
    answers[2].set_result(None)
    answers[1].set_exception(RuntimeError("a failed request ends too"))
    lanes = {e["args"]["sequences"]: e["tid"] for e in read(path) if e["ph"] == "X"}
    assert lanes[0] == lanes[2] != lanes[1]


def test_an_activity_lies_within_the_one_around_it(tmp_path):
    path = tmp_path / "trace.json"
    timeline = Timeline(trace=Trace(path, (1, 1)))
    timeline.begin_step(1)
    with timeline.during("forward_backward"), timeline.during("teacher"):
        pass
    timeline.end_step()
    events = complete(path)
    outer = events["step"]
    for name in ("forward and backward", "waiting for the teacher"):
        inner = events[name]
        assert outer["ts"] <= inner["ts"]
        assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 1e-3
    titles = {e["tid"]: e["args"]["name"] for e in read(path) if e["name"] == "thread_name"}
    assert titles[events["waiting for the teacher"]["tid"]] == "waiting for the teacher"
    assert len({event["tid"] for event in events.values()}) == 3
