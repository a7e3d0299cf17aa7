"""Each kind scores right answers 1, wrong ones 0, and survives whatever a model may write."""

import json
import re
import threading
import time
from pathlib import Path

import pytest
import reasoning_gym
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_srpo.core.text import after_thinking
from megatron_srpo.rewards import RewardError, known_kinds, resolve
from megatron_srpo.rewards.mcq import score_lenient
from megatron_srpo.rewards.tags import last_boxed, last_tagged
from megatron_srpo.rewards.tooluse import DEPTH_LIMIT, NAMED_LIMIT, read_calls

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
LONG = 1_000_000  # characters

mcq, tooluse, exact, mathematics, gym = map(resolve, ("mcq", "tooluse", "exact", "math", "reasoning-gym"))


def shared_rows(pattern):
    rows = [json.loads(line) for path in sorted(SHARED.glob(pattern)) for line in path.open()]
    if not rows:
        pytest.skip("the shared data sets are not here")
    return rows


def test_the_built_in_kinds_are_the_files():
    assert known_kinds() == ["exact", "math", "mcq", "reasoning_gym", "tooluse"]
    assert resolve("reasoning-gym") is resolve("reasoning_gym")


# --- mcq


@pytest.mark.parametrize(
    ("response", "score", "well_formed"),
    [
        ("<reasoning>x</reasoning>\n<answer>\nB\n</answer>\n", 1, True),
        ("<answer>A</answer> no: <answer>B</answer>", 1, True),
        ("<answer>B</answer> no: <answer>A</answer>", 0, True),
        ("<answer>B</answer> I am sure.", 1, False),
        ("<answer>B</answer><answer>B", 0, False),  # the last one is not closed
        ("<answer>b</answer>", 0, False),
        ("<answer>B: the second</answer>", 0, False),
        ("<answer></answer>", 0, False),
        ("</answer>B<answer>", 0, False),
        ("B", 0, False),
        ("", 0, False),
    ],
)
def test_mcq_compares_the_last_answer(response, score, well_formed):
    verdict = mcq(response, "B", {})
    assert (verdict.score, verdict.well_formed) == (score, well_formed)
    assert (verdict.feedback is None) == (score == 1)


@pytest.mark.parametrize(
    ("response", "score", "well_formed"),
    [
        ("<answer>A</answer> no: <answer>\nB\n</answer>", 1, True),
        ("<answer>B</answer> no: <answer>A</answer>", 0, True),
        ("B", 1, False),
        ("B</answer>", 1, False),
        ("It is <answer>B", 1, False),
        ("<answer>A</answer><answer>B", 1, False),
        ("<answer>B</answer> I am sure.</answer>", 1, True),
        ("<answer>b</answer>", 0, False),
        ("The answer is B", 0, False),
        ("", 0, False),
    ],
)
def test_mcqs_lenient_format_reads_as_sdpos_code_does(response, score, well_formed):
    verdict = score_lenient(response, "B", {})
    assert (verdict.score, verdict.well_formed) == (score, well_formed)


def test_mcqs_feedback_never_names_the_right_option():
    wrong = [mcq(text, "D", {}) for text in ("", "<answer>A</answer>", "<answer>x</answer>", "<answer>", "D")]
    assert not any(re.search(r"\bD\b", verdict.feedback) for verdict in wrong)


def test_mcq_refuses_an_answer_that_is_no_letter():
    for answer in (None, 3, "", ["A"]):
        with pytest.raises(RewardError, match="letter"):
            mcq("<answer>A</answer>", answer, {})


def test_mcq_scores_the_real_rows():
    for row in shared_rows("sciknoweval/*.jsonl"):
        right, wrong = row["answer"], "B" if row["answer"] == "A" else "A"
        assert mcq(f"<reasoning>r</reasoning>\n<answer>\n{right}\n</answer>", right, row)[:3] == (1.0, None, True)
        assert mcq(f"<answer>{wrong}</answer>", right, row).score == 0


def test_an_answer_in_thinking_is_a_draft_and_gets_no_reward():
    entry = json.loads(json.dumps(reasoning_gym.create_dataset("chain_sum", size=1, seed=3)[0]))
    metadata, right = {"dataset": "chain_sum", "entry": entry}, entry["answer"]
    for score, form in ((mcq, "<answer>{}</answer>"), (mathematics, "\\boxed{{{}}}"), (gym, "<answer>{}</answer>")):
        answer, other = ("B", form.format("D")) if score is mcq else (right, form.format("-7"))
        draft = form.format(answer)
        assert score(f"<think>{other}</think>\nSo {draft}", answer, metadata).score == 1
        for response in (f"<think>{draft} or", f"<think>{draft}</think>", f"<think>{draft}</think>{other}"):
            assert score(response, answer, metadata).score < 0.1, response


# --- tooluse


def call(action, given):
    given = given if isinstance(given, str) else json.dumps(given)
    return f"Thought: I should do this.\nAction: {action}\nAction Input: {given}\n"


def answer(*calls):
    return json.dumps([{"Action": action, "Action_Input": json.dumps(given)} for action, given in calls])


NESTED = {
    "user": {"name": "J. {Doe}", "tags": [{"a": 1}, {"b": [1, 2, {}]}]},
    "note": 'Action: x\nAction Input: {"a": 1}',
}


def test_tooluse_accepts_the_expected_calls_in_any_order_of_actions():
    expected = answer(("find", {"q": "x", "n": 3}), ("list", {}))
    verdict = tooluse(call("list", {}) + call("find", {"n": 3.0, "q": "x"}), expected, {})
    assert verdict[:3] == (1.0, None, True)


def test_tooluse_reads_nested_braces_and_marks_inside_strings_as_one_input():
    assert tooluse(call("send", NESTED), answer(("send", NESTED)), {})[:3] == (1.0, None, True)
    assert tooluse(call("send", json.dumps(NESTED, indent=4)), answer(("send", NESTED)), {}).score == 1


@pytest.mark.parametrize(
    ("response", "feedback"),
    [
        ("", "calls no action"),
        (call("other", {"q": "x", "n": 3}), "superfluous actions: 'other'"),
        (call("find", {"q": "x", "n": 3}) * 2, "superfluous actions: 'find'"),
        (call("find", {"q": "y", "n": 3}), "wrong value: 'q'"),
        (call("find", {"q": "x", "n": "3"}), "wrong value: 'n'"),
        (call("find", {"q": "x", "n": True}), "wrong value: 'n'"),
        (call("find", {"q": "x"}), "Missing input names: 'n'"),
        (call("find", {"q": "x", "n": 3, "m": 1}), "Unknown input names: 'm'"),
        (call("find", '{"q": "x", "n": 3'), "not valid JSON"),
        (call("find", '{"q": "x", "n": 3}}'), "goes on behind"),
        (call("find", '{"q": "x"}, {"n": 3}'), "goes on behind"),
        (call("find", "{'q': 'x', 'n': 3}"), "not valid JSON"),
        (call("find", '[{"q": "x", "n": 3}]'), "not a JSON object"),
        (call("find", '{"q": "x", "n": NaN}'), "not valid JSON: NaN"),
        (call("find", '{"q": "x", "n": ' + "[" * 5000 + "]" * 5000 + "}"), "nested too deeply"),
        (call("find", '{"q": "x", "n": ' + "1" * 10_000 + "}"), "not valid JSON"),
        ("Action: find", "Missing input names"),
        ('Action Input: {"q": "x", "n": 3}', "calls no action"),
    ],
)
def test_tooluse_says_what_does_not_match(response, feedback):
    verdict = tooluse(response, answer(("find", {"q": "x", "n": 3})), {})
    assert verdict.score == 0 and feedback in verdict.feedback


@pytest.mark.parametrize(("given", "right"), [(True, 1), (0, False), ([1], [True]), ({"a": 1}, {"a": True}), ("1", 1)])
def test_tooluse_tells_values_of_different_types_apart(given, right):
    assert tooluse(call("find", {"n": given}), answer(("find", {"n": right})), {}).score == 0
    assert tooluse(call("find", {"n": right}), answer(("find", {"n": right})), {}).score == 1


def test_an_action_without_its_input_is_not_well_formed():
    assert tooluse("Action: list", answer(("list", {})), {})[:3] == (1.0, None, False)


def test_an_input_may_be_nested_as_deeply_as_its_limit():
    for depth, score in ((DEPTH_LIMIT, 1), (DEPTH_LIMIT + 1, 0)):
        deep = '{"n": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"
        assert tooluse(call("find", deep), [{"Action": "find", "Action_Input": json.loads(deep)}], {}).score == score


def test_a_feedback_says_whether_it_names_everything():
    for count, more in ((NAMED_LIMIT, False), (NAMED_LIMIT + 1, True)):
        verdict = tooluse(call("find", dict.fromkeys(map(str, range(count)))), answer(("find", {})), {})
        assert verdict.feedback.endswith(", ….") is more


def test_tooluses_feedback_holds_no_expected_value():
    verdict = tooluse(call("find", {"code": "mine"}), answer(("find", {"code": "s3cret"}), ("hidden", {"pin": 77})), {})
    assert verdict.score == 0 and not re.search("s3cret|77|hidden", verdict.feedback)


def test_tooluse_merges_inputs_as_the_reference_does_the_later_value_counts():
    expected = answer(("find", {"size": "small"}), ("find", {"size": "large"}))
    assert tooluse(call("find", {"size": "small"}) + call("find", {"size": "large"}), expected, {}).score == 1
    assert tooluse(call("find", {"size": "large"}) + call("find", {"size": "small"}), expected, {}).score == 0
    thrice = answer(*(("find", {"size": size}) for size in ("small", "large", "large")))
    for sizes, right in ((("large", "small", "large"), 1), (("small", "large", "small"), 0)):
        assert tooluse("".join(call("find", {"size": size}) for size in sizes), thrice, {}).score == right


def test_a_later_call_does_not_hide_a_wrong_earlier_value_of_the_same_argument():
    once = answer(("find", {"city": "Rome"}), ("book", {"city": "Rome"}))
    assert tooluse(call("find", {"city": "Rome"}) + call("book", {"city": "Rome"}), once, {}).score == 1
    hidden = tooluse(call("find", {"city": "Oslo"}) + call("book", {"city": "Rome"}), once, {})
    assert hidden.score == 0 and "wrong value: 'city'" in hidden.feedback
    twice = answer(("find", {"city": "Oslo"}), ("book", {"city": "Rome"}))
    assert tooluse(call("find", {"city": "Rome"}) + call("book", {"city": "Rome"}), twice, {}).score == 0


@pytest.mark.parametrize("between", ["\n", "\n\n  ", " \r\n"])
def test_tooluse_reads_a_name_on_the_line_after_its_mark(between):
    response = f'Action:{between}find\nAction Input:{between}{{"q": 1}}\n'
    assert tooluse(response, answer(("find", {"q": 1})), {})[:3] == (1.0, None, True)
    assert read_calls("Action:\nAction: find\nAction:\nAction Input: {}").actions == ["", "find", ""]


def test_tooluses_predictions_are_equal_for_what_it_takes_for_the_same_answer():
    def prediction(*calls):
        return tooluse("".join(call(*one) for one in calls), answer(("x", {})), {}).prediction

    assert prediction(("a", {"n": 1}), ("b", {"m": 2})) == prediction(("b", {"m": 2.0}), ("a", {"n": 1.0}))
    assert prediction(("a", {"n": 1})) != prediction(("a", {"n": True}))
    assert prediction(("a", {"n": 1}), ("a", {"n": 2})) != prediction(("a", {"n": 3}), ("a", {"n": 2}))


def test_tooluse_ignores_drafts_in_thinking():
    right = call("find", {"q": 1})
    assert tooluse(f"<think>{call('no', {'x': 1})}</think>{right}", answer(("find", {"q": 1})), {}).score == 1
    assert tooluse(f"<think>{right} or", answer(("find", {"q": 1})), {}).score == 0, "cut before the answer"
    assert after_thinking("a</think>b</think>c") == "c" and after_thinking("abc") == "abc"
    assert after_thinking("<think>a") == after_thinking("a</think>\n<think>b") == ""


def test_tooluse_takes_calls_on_one_line():
    assert (
        tooluse(
            'Action: find Action Input: {"q": 1} Action: list Action Input: {}',
            answer(("find", {"q": 1}), ("list", {})),
            {},
        ).score
        == 1
    )


@pytest.mark.parametrize(
    "broken",
    [
        3,
        {},
        "x",
        '[{"action": "x"}]',
        '[{"Action": "x", "Action_Input": "{"}]',
        '[{"Action": "x", "Action_Input": 3}]',
        None,
    ],
)
def test_tooluse_refuses_an_answer_that_is_no_list_of_calls(broken):
    with pytest.raises(RewardError, match="tooluse"):
        tooluse("Action: x", broken, {})


def test_tooluse_scores_the_real_rows():
    for row in shared_rows("tooluse/*.jsonl"):
        calls = [(one["Action"], one["Action_Input"]) for one in json.loads(row["answer"])]
        assert tooluse("".join(call(*one) for one in calls), row["answer"], row)[:3] == (1.0, None, True)
        assert tooluse("".join(call(*one) for one in calls[:-1]), row["answer"], row).score == 0
        (name, given), *rest = calls
        changed = {**json.loads(given), "zz": 1}
        assert tooluse("".join(call(*one) for one in [(name, changed), *rest]), row["answer"], row).score == 0


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
calls_of = st.lists(
    st.tuples(
        st.from_regex(r"[a-zA-Z]{1,8}", fullmatch=True), st.dictionaries(st.text(max_size=5), json_values, max_size=3)
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(calls_of, st.booleans())
def test_tooluse_scores_any_calls_against_themselves_as_right(calls, ascii_only):
    response = "".join(call(name, json.dumps(given, ensure_ascii=ascii_only)) for name, given in calls)
    assert tooluse(response, answer(*calls), {})[:3] == (1.0, None, True)
    assert tooluse(response + call("extra", {}), answer(*calls), {}).score == 0


PIECES = st.sampled_from(
    ["Action:", "Action Input:", "{", "}", '"', "\\", "[", "]", ":", ",", "a", "1", "\n", " ", "<answer>", "</answer>",
     "A", "\\boxed", "\\boxed{", "\\frac", "<think>", "</think>", "null", "e9", "-", "\ud800", "\x00", "'", "−"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=40).map("".join))
def test_no_text_breaks_a_parser(text):
    assert tooluse(text, answer(("zzz", {"k": 1})), {}).score == 0
    assert mcq(text, "Z", {}).score == 0
    assert exact(text, "§", {}).score == 0
    given = last_tagged(text, "answer")
    assert given is None or given in text
    boxed = last_boxed(text)
    assert boxed is None or f"{{{boxed}}}" in text


@pytest.mark.parametrize(
    "unit",
    ["Action:", "Action Input:", "Action Input: {", 'Action Input: {"', 'Action Input: {"a":[', "<answer>", "</answer>",
     "\\boxed", "\\boxed{", "\\boxed{a}", "\\boxed ", "{", " ", "\n", '"', "</think>", "Action: a\nAction Input: {}\n",
     'Action Input: {"a\\"']
)  # fmt: skip
def test_a_megabyte_of_anything_is_read_in_linear_time(unit):
    text, before = unit * (LONG // len(unit)), time.process_time()
    for score, right in ((mcq, "Z"), (tooluse, answer(("zzz", {}))), (exact, "zzz")):
        assert score(text, right, {}).score == 0
    last_boxed(text), last_tagged(text, "answer")
    assert time.process_time() - before < 3  # some 0.2 s; what is quadratic takes minutes


def test_the_number_of_calls_is_bounded():
    calls = read_calls(call("a", {}) * 5000)
    assert len(calls.actions) == len(calls.inputs) == 256 and "more than 256" in calls.problems[0]


# --- math


@pytest.mark.parametrize(
    ("content", "right"),
    [
        (r"\frac{1}{2}", "0.5"),
        ("42", 42),
        ("-1.5", -1.5),
        ("x+1", "1+x"),
        (r"2\sqrt{3}", r"$\sqrt{12}$"),
        (r"\{1, 2\}", r"\{2,1\}"),
        ("(1,2]", "(1,2]"),
        ("1,000", "1000"),
        (r"12\text{ cm}", "12"),
        ("7", r"thus \boxed{7}"),
        ("Paris", "Paris"),
    ],
)
def test_math_compares_what_the_box_means(content, right):
    assert mathematics(f"So we get \\boxed{{{content}}}.", right, {})[:3] == (1.0, None, True)
    verdict = mathematics("So we get \\boxed{5.5+z}.", right, {})
    assert verdict.score == 0 and verdict.well_formed and verdict.feedback


@pytest.mark.parametrize(
    "response",
    [
        "42", "", "\\boxed{", "\\boxed{}", "\\boxed{4", "\\boxed 42", "\\boxed{" + "4" * 3000 + "}",
        "\\boxed{42" + " " * 3000 + "or 43}",
    ],
)  # fmt: skip
def test_math_needs_a_box(response):
    verdict = mathematics(response, "42", {})
    assert (verdict.score, verdict.well_formed) == (0, False)


def test_math_reads_the_last_closed_box():
    assert last_boxed(r"\boxed{1} \boxed{\frac{2}{3}} \boxed{4") == r"\frac{2}{3}"
    assert last_boxed(r"\boxed{a\}b}") == r"a\}b" and last_boxed(r"\fbox {x}") == "x"


def test_math_works_outside_the_main_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(mathematics(r"\boxed{\frac{2}{4}}", "1/2", {}).score))
    thread.start()
    thread.join()
    assert seen == [1.0]


# --- exact and reasoning-gym


@pytest.mark.parametrize(
    ("response", "right", "score"), [(" 12\n", "12", 1), ("12", 12, 1), ("1 2", "12", 0), ("", "12", 0)]
)
def test_exact_compares_the_whole_response(response, right, score):
    assert exact(response, right, {}).score == score


@pytest.mark.parametrize("right", [None, [1], {"a": 1}, True, "", " "])
def test_exact_refuses_an_answer_that_is_no_text_or_that_an_empty_response_would_have(right):
    with pytest.raises(RewardError, match="exact"):
        exact("x", right, {})


@pytest.mark.parametrize("name", ["chain_sum", "leg_counting", "letter_counting", "spell_backward"])
def test_reasoning_gym_uses_the_librarys_own_scorer_after_a_round_trip_through_json(name):
    entry = json.loads(json.dumps(reasoning_gym.create_dataset(name, size=1, seed=3)[0]))
    for metadata in ({"dataset": name, "entry": entry}, {"entry": entry, "dataset": "our-own-name"}):
        right = gym(f"thinking\n<answer>{entry['answer']}</answer>", entry["answer"], metadata)
        assert right[:3] == (1.0, None, True)
        wrong = gym("<answer>-12345.25</answer>", entry["answer"], metadata)
        assert wrong.score < 0.5 and wrong.feedback
        assert gym(str(entry["answer"]), entry["answer"], metadata).score == 0  # no <answer>


@pytest.mark.parametrize("name", ["graph_color", "rush_hour", "chain_sum"])
def test_reasoning_gym_reads_an_entry_as_json_or_without_its_answer_as_parquet_has_them(name):
    entry = json.loads(json.dumps(reasoning_gym.create_dataset(name, size=1, seed=3)[0]))
    right = entry["answer"] or "unknown"  # the library gives no answer where many are right
    wanted = gym(f"<answer>{right}</answer>", right, {"dataset": name, "entry": entry})
    without = {key: value for key, value in entry.items() if key != "answer"}
    for form in (without, json.dumps(entry)):
        assert gym(f"<answer>{right}</answer>", right, {"dataset": name, "entry": form}) == wanted


def test_reasoning_gym_refuses_rows_without_an_entry_or_a_known_data_set():
    entry = {"question": "q", "answer": "a", "metadata": {}}
    with pytest.raises(RewardError, match='"entry"'):
        gym("<answer>1</answer>", "1", {"dataset": "chain_sum", "entry": "x"})
    with pytest.raises(RewardError, match='"entry"'):
        gym("<answer>1</answer>", "1", {"dataset": "chain_sum", "entry": "[1]"})
    with pytest.raises(RewardError, match='"dataset"'):
        gym("<answer>1</answer>", "1", {"dataset": "nope", "entry": entry})


@pytest.mark.parametrize(
    ("function", "response", "right", "prediction"),
    [
        (mcq, "hm <answer> B </answer>", "A", "B"),
        (mcq, "no answer", "A", None),
        (mathematics, "so \\boxed{ 7 }", "7", "7"),
        (mathematics, "so \\boxed{8}", "7", "8"),
    ],
)
def test_the_answer_that_was_read_is_reported_for_a_majority_vote(function, response, right, prediction):
    assert function(response, right, {}).prediction == prediction
