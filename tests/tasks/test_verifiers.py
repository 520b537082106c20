"""Verifiers by name and reward functions: answers, odd text, limits of time, faults of functions."""

import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from grpo.tasks import TaskError
from grpo.tasks.verifiers import VERIFIERS, final_answer, verifier
from grpo.tasks.worker import Worker, WorkerError

ODD = [
    "",
    " ",
    "\x00",
    "\ud800",
    "<answer>",
    "</answer>",
    "<answer></answer>",
    "\\boxed{",
    "((((",
    "```json\n",
]
ODD += ["1" * 5000, "9e999999999", "1/0", "[" * 3000, "-" * 3000, "NaN", "<think>7", "$" * 99]


def judge(name, gold, text):
    made = verifier(name)
    assert made.problem(gold) is None
    verdict = made.verify({"gold": gold}, text)
    assert verdict.score == float(verdict.ok)
    return verdict.reason


@pytest.mark.parametrize(
    ("name", "gold", "text", "reason"),
    [
        ("exact", "New York", "  New\n York ", "ok"),
        ("exact", "New York", "new york", "wrong_value"),
        ("exact", ["a", "b"], "b", "ok"),
        ("exact", "a", "I say <answer>b</answer>, no: <answer> a </answer>", "ok"),
        ("exact", "a", "it is \\boxed{{a}}"[:-1], "wrong_value"),
        ("exact", "x^{2}", "so \\boxed{x^{2}} it is", "ok"),
        ("exact", 5, "5", "ok"),
        ("number", "1,000", "so 1000.0.", "ok"),
        ("number", 0.5, "it is 1/2.", "ok"),
        ("number", "1/2", "it is .5", "ok"),
        ("number", "48/2 = 24\n#### 24", "first 7, then 24", "ok"),
        ("number", -3, "5-3 = 2, x=-3", "ok"),
        ("number", 5, "It is (3, 5).", "ok"),
        ("number", 1234, "1,234", "ok"),
        ("number", 7, "x7", "no_answer"),
        ("number", 7, "7 apples and 8 pears", "wrong_value"),
        ("number", 1e3, "1e3", "ok"),
        ("choice", "B", "The answer is (B).", "ok"),
        ("choice", 1, "b", "ok"),
        ("choice", "(c)", "C", "ok"),
        ("choice", "B", "B. I think so", "ok"),
        ("choice", "A", "A dog", "no_answer"),
        ("choice", "A", "A or B: A", "ok"),
        ("json", {"a": [1, 2]}, 'So:\n```json\n{"a": [1.0, 2]}\n```', "ok"),
        ("json", '{"b": true, "a": 1}', '<answer>{"a": 1, "b": true}</answer>', "ok"),
        ("json", [1], "[true]", "wrong_value"),
        ("json", [1], '{"a": 1, "a": 1}', "parse"),
        ("regex", "(red|blue) \\d+", "blue 12", "ok"),
        ("regex", "red", "red and blue", "wrong_value"),
    ],
)
def test_answers(name, gold, text, reason):
    assert judge(name, gold, text) == reason


@pytest.fixture(scope="module")
def math():
    return verifier("math")


@pytest.mark.parametrize(
    ("gold", "text", "reason"),
    [
        ("\\frac{1}{2}", "so $0.5$", "ok"),
        ("\\frac{1}{2}", "\\boxed{\\frac12}", "ok"),
        ("1/3", "<answer>\\frac{1}{3}</answer>", "ok"),
        ("$\\{1, 2\\}$", "the set $\\{2, 1\\}$", "ok"),
        ("(1, 2]", "$(1, 2]$", "ok"),
        ("x^2+1", "$1 + x^2$", "ok"),
        ("#### 72", "it is 72", "ok"),
        ("7", "the answer is 8", "wrong_value"),
        ("7", "no idea", "no_answer"),
        ("7", "<think>7</think> 8", "wrong_value"),
        ("7", "<think>7", "no_answer"),
    ],
)
def test_math(math, gold, text, reason):
    assert math.problem(gold) is None
    assert math.verify({"gold": gold}, text).reason == reason


def test_math_that_takes_too_long_is_wrong_and_the_next_answer_is_judged(math):
    limited = verifier("math", seconds=2)
    started = time.monotonic()
    assert limited.verify({"gold": "5"}, "$9^{9^{9^{9}}}$").reason in ("time_limit", "crash")
    assert time.monotonic() - started < 60
    reasons = []
    # math-verify's own limit fails outside the main thread
    thread = threading.Thread(target=lambda: reasons.append(math.verify({"gold": "5"}, "$5$").reason))
    thread.start()
    thread.join()
    assert reasons == ["ok"]


def test_a_regular_expression_that_backtracks_ends_at_the_limit():
    limited = verifier("regex", seconds=0.5)
    assert limited.verify({"gold": "(a+)+b"}, "a" * 40).reason == "time_limit"
    assert limited.verify({"gold": "a+"}, "a" * 40).reason == "ok"


@pytest.mark.parametrize("name", [name for name in VERIFIERS if name != "math"])
def test_no_text_raises(name):
    gold = {"number": "1", "choice": "A", "json": "1"}.get(name, "a")
    made = verifier(name, seconds=1)
    for text in ODD:
        assert not made.verify({"gold": gold}, text).ok
        assert made.states({"gold": gold}, text) in (True, False)


def test_no_text_raises_in_math(math):
    for text in ODD:
        assert not math.verify({"gold": "3"}, text).ok


@pytest.mark.parametrize(
    ("name", "gold"),
    [("exact", ""), ("exact", None), ("exact", []), ("number", "none"), ("number", None), ("choice", "AB")]
    + [
        ("choice", -1),
        ("json", "{"),
        ("regex", "("),
        ("regex", "a{9999999999}"),
        ("regex", 5),
        ("exact", {"a": 1}),
    ],
)
def test_golds_that_cannot_be_used(name, gold):
    assert "must" in verifier(name).problem(gold)


ENDS = "1,5|12:30|2024-01-05|10^3|2*3|3-7|3\u20137|1 000|1'000|3 1/2|1,00|3,4,5|0,125|1,234,5".split("|")


@pytest.mark.parametrize("gold", [*ENDS, "7 #### 1,5"])
def test_a_number_of_which_only_the_end_would_count_is_refused(gold):
    assert "must end in one number" in verifier("number").problem(gold)


@pytest.mark.parametrize("text", ENDS)
def test_an_answer_of_which_only_the_end_would_count_is_not_right(text):
    """3,5 is a list or 3.5, and 5 in neither case."""
    number = verifier("number")
    end = re.findall(r"\d+(?:/\d+)?", text)[-1]
    assert number.problem(end) is None and number.verify({"gold": end}, end).ok
    assert number.verify({"gold": end}, f"The answer is {text}").reason == "no_answer"


@pytest.mark.parametrize(
    "gold",
    "5|-5|x=-3|1,000|1,234,567.5|1/2|1 / 2|1e-3|2-1 and 7|20 apples, 30|3*5=15|3*5 #### 15|In 2024 10".split(
        "|"
    ),
)
def test_one_number_is_accepted(gold):
    assert verifier("number").problem(gold) is None


def test_an_index_as_text_is_refused_in_words_that_fit():
    assert verifier("choice").problem(1) is None
    assert "a number (not text)" in verifier("choice").problem("1")  # CSV has text only


def test_the_right_answer_is_right_and_stated():
    for name, gold in [("exact", "a b"), ("number", "#### 1,234"), ("choice", 2), ("json", [1, {"a": None}])]:
        made = verifier(name)
        text = made.right_answer(gold)
        assert made.verify({"gold": gold}, text).ok and made.states({"gold": gold}, text)
        assert not made.states({"gold": gold}, "nothing")


def test_the_answer_inside_a_text():
    assert final_answer("a <answer>b</answer> c") == "b"
    assert final_answer("\\boxed{1} and \\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert final_answer(" all of it ") == "all of it"


def test_unknown_names():
    with pytest.raises(ValueError, match="verifier must be one of exact, .*got 'maths'; did you mean math"):
        verifier("maths")
    with pytest.raises(ValueError, match="only functions can be combined"):
        verifier(["exact", "number"])
    with pytest.raises(ValueError, match="belong to functions"):
        verifier("exact", weights=[1.0])


# --- functions ----------------------------------------------------------------------------------------------

REWARDS = """
import asyncio
import signal

def right(completions, answer, **kwargs):
    return [2.0 if answer_ in text else 0.0 for answer_, text in zip(answer, completions)]

def messages(prompts, completions, **kwargs):
    assert prompts[0][-1]["role"] == "user" and completions[0][0]["role"] == "assistant"
    return [len(completion[0]["content"]) for completion in completions]

def narrow(completions):
    return [0.25 for _ in completions]

async def later(completions, log_metric, **kwargs):
    log_metric("name", 1.0)
    await asyncio.sleep(0)
    return [0.5]

def alarm(completions, **kwargs):  # as math-verify does
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(1)
    signal.alarm(0)
    print("noise")
    return [1]

def skips(completions, **kwargs): return [None]
def nan(completions, **kwargs): return [float("nan")]
def few(completions, **kwargs): return []
def scalar(completions, **kwargs): return 1.0
def words(completions, **kwargs): return ["good"]
def raises(completions, **kwargs): return kwargs["nothing"]
def exits(completions, **kwargs): raise SystemExit(3)
def hangs(completions, **kwargs):
    while True:
        pass
def typo(completions, anwser): return [1.0]
def ids(completion_ids, **kwargs): return [1.0]
constant = 5
"""
COLUMNS = ["question", "answer"]
DATA = {
    "prompt": "What?",
    "gold": "7",
    "columns": {"question": "What?", "answer": "7"},
    "where": "data.jsonl line 3",
}


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARDS)
    return path


def function(rewards, *names, **options):
    return verifier([f"function:{rewards}:{name}" for name in names], columns=COLUMNS, **options)


@pytest.mark.parametrize(
    ("names", "weights", "score"),
    [
        (["right"], None, 2.0),
        (["narrow"], None, 0.25),
        (["later"], None, 0.5),
        (["alarm"], None, 1.0),
        (["right", "narrow", "skips"], [1.0, 2.0, 5.0], 2.5),
    ],
)
def test_functions_score_as_in_trl(rewards, names, weights, score):
    made = function(rewards, *names, weights=weights)
    verdict = made.verify(DATA, "it is 7")
    assert verdict.score == score and verdict.reason == ("ok" if score >= 1 else "wrong")


def test_functions_get_messages_where_the_prompt_is_messages(rewards):
    data = {**DATA, "prompt": [{"role": "user", "content": "What?"}]}
    assert function(rewards, "messages").verify(data, "four").score == 4.0


def test_functions_judge_what_follows_the_thought(rewards):
    text = "<think>7</think> 8"
    assert function(rewards, "right").verify(DATA, text).score == 0.0
    assert function(rewards, "right", keep_thoughts=True).verify(DATA, text).score == 2.0
    assert function(rewards, "right").verify(DATA, "<think>7").reason == "no_answer"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("skips", "returned None, so the answer has no score"),
        ("nan", "must return finite numbers, got nan"),
        ("few", "must return one number per completion, got 0 for 1"),
        ("scalar", "must return a list of numbers, got 1.0"),
        ("words", "must return numbers, got 'good'"),
        ("raises", r"raised KeyError: 'nothing' \(rewards.py, line \d+\)"),
        ("exits", "ended its process"),
        ("hangs", "took longer than 1 seconds"),
    ],
)
def test_faults_of_functions_name_function_row_and_columns(rewards, name, message):
    made = function(rewards, name, seconds=1)
    with pytest.raises(TaskError, match=message) as caught:
        made.verify(DATA, "it is 7")
    assert f"rewards.py:{name}" in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith("for data.jsonl line 3 (columns question, answer)")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("typo", "takes 'anwser', but must take only .* question, answer; did you mean answer"),
        ("ids", "takes 'completion_ids'"),
        ("constant", "must be a function, got 5"),
        ("rihgt", "has no 'rihgt'; did you mean right"),
    ],
)
def test_functions_that_cannot_be_called_are_refused(rewards, name, message):
    with pytest.raises(ValueError, match=message):
        function(rewards, name)


def test_a_file_that_is_not_there(rewards):
    with pytest.raises(ValueError, match="there is no file .*reward.py.*did you mean rewards.py"):
        verifier(f"function:{rewards.with_name('reward.py')}:right")
    with pytest.raises(ValueError, match="weights must be as many as functions, 1, got 2"):
        function(rewards, "right", weights=[1.0, 2.0])


# --- the process --------------------------------------------------------------------------------------------


def test_a_worker_ends_with_its_parent_object():
    worker = Worker("grpo.tasks.verifiers:regex_judge", {}, seconds=5)
    assert worker({"golds": ["a"], "answer": "a"}) == "ok"
    (process,) = (each._process for each in worker._idle)
    worker.close()
    assert process.poll() is not None
    assert worker({"golds": ["a"], "answer": "b"}) == "wrong_value"  # a new process
    (process,) = (each._process for each in worker._idle)
    del worker
    assert process.poll() is not None


def test_a_worker_imports_nothing_from_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('code of the data folder')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    worker = Worker("grpo.tasks.verifiers:regex_judge", {}, seconds=5)
    assert worker({"golds": ["a"], "answer": "a"}) == "ok"


def test_what_a_worker_cannot_build():
    with pytest.raises(WorkerError, match=re.escape("raised ModuleNotFoundError: No module named 'no_such'")):
        Worker("no_such:judge", {}, seconds=5).open()


def test_calls_at_once_get_a_process_each():
    worker = Worker("grpo.tasks.verifiers:regex_judge", {}, seconds=20)
    start = threading.Barrier(3)

    def judge(answer):
        start.wait()
        return worker({"golds": ["a|b"], "answer": answer})

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(judge, "abc")) == ["ok", "ok", "wrong_value"]
    assert len(worker._idle) == 3  # none was shared, and all are kept
    assert worker({"golds": ["a"], "answer": "a"}) == "ok" and len(worker._idle) == 3
    worker.close()
