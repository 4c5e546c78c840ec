"""Trajectories of the Manager: their outputs, outcomes and advantages, and the banks that episodes take from them."""
import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toys import encode_texts, files_of

import grpo
import manager
import ppo
import train_manager
from answer import Answer
from data import Dialogue, Question, Turn, UsageError
from policy import Completion, Policy
from support.rollouts import Played, group_rows, minibatches
from support.trajectories import cut, draw, excess, outcomes

ALGORITHMS = pytest.mark.parametrize("algorithm", [grpo, ppo])
SMALL = ["--eval", "0", "--bank", "trajectory", "--trajectories", "3", "--conversations", "2",
         "--batch-size", "4", "--group-size", "2"]


pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------ advantages

@pytest.mark.parametrize("rewards, labels, wanted", [
    ([1, 5, 0], "aba", [0.7071, 0, -0.7071]), ([0, 0, 1, 1], "abab", [-0.7071, -0.7071, 0.7071, 0.7071]),
    ([1, 2, 3, 9], "aaab", [-1, 0, 1, 0]), ([0.1] * 3, "aaa", [0, 0, 0]), ([2], "a", [0]), ([], "", [])])
def test_advantages_inside_labels(rewards, labels, wanted):
    found = grpo.labelled_advantages(torch.tensor(rewards, dtype=torch.float), list(labels))
    assert found.tolist() == pytest.approx(wanted, abs=3e-4)


def test_labels_of_rows_give_the_advantages_of_groups_in_any_order():
    rng = random.Random(0)
    for seed in range(20):
        torch.manual_seed(seed)
        rewards = torch.rand(4, 5).round(decimals=1)
        order = rng.sample(range(20), 20)
        found = grpo.labelled_advantages(rewards.flatten()[order], [("row", i // 5) for i in order])
        torch.testing.assert_close(found, grpo.group_advantages(rewards).flatten()[order], atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------------------------------------ the update

PLAIN = dict(group_size=4, max_new_tokens=6, minibatch=0, beta=0.1)


def sampled(policy, texts=("Hi", "What is it?", "Spell a word"), sizes=(4, 4, 4)):
    prompts = encode_texts(policy, texts)
    torch.manual_seed(3)
    with policy.using("agent"):
        return prompts, [policy.sample([prompt], size, 6)[0] for prompt, size in zip(prompts, sizes, strict=True)]


def trajectory_of(prompt, group, rewards, weights=(1.0, 1.0)):
    """The outputs of one prompt as if they were those of trajectories at one turn."""
    return Played([prompt] * len(group), group, torch.tensor(rewards), ["turn"] * len(group), weights)


def step_of(tiny, algorithm, count, played=None, rewards=None, **options):
    """The gradient of one update with the first `count` groups, and the metrics."""
    policy, config = tiny(), algorithm.Config(**PLAIN | options)
    prompts, groups = sampled(policy)
    task = SimpleNamespace(batch=lambda step: [SimpleNamespace(prompt=prompt) for prompt in prompts[:count]],
                           rewards=lambda *_: (torch.tensor(rewards or REWARDS)[:count], {}, []),
                           played=played and played(prompts, groups))
    policy.sample, found = lambda *_: groups[:count], {}
    loop = SimpleNamespace(steps=lambda optimizer: [1], reference=None,
                           log=lambda step, metrics, samples: found.update(metrics))
    torch.manual_seed(5)  # the critic's weights
    algorithm.train(policy, task, loop, "agent", config)
    return torch.cat([x.grad.flatten() for x in policy.parameters("agent") if x.grad is not None] or
                     [torch.zeros(1)]), found


REWARDS = [[1.0, 0, 0.5, 0], [0, 0, 1, 0], [0.2, 0.4, 0.6, 0.9]]


@ALGORITHMS
def test_outputs_of_trajectories_with_one_prompt_equal_a_group(tiny, algorithm):
    """Whether four outputs are a group or four outputs with one label: the same gradient."""
    whole, metrics = step_of(tiny, algorithm, 3)
    parts, same = step_of(tiny, algorithm, 2, lambda prompts, groups: trajectory_of(prompts[2], groups[2], REWARDS[2]))
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)
    assert whole.abs().max() > 1e-3 and same["kl"] == pytest.approx(metrics["kl"], rel=1e-3)


@ALGORITHMS
def test_the_weights_of_both_parts(tiny, algorithm):
    """Without a KL term the gradient is linear in the weights. Only gradients below the clip can be compared."""
    def gradient(*weights):
        return step_of(tiny, algorithm, 2, lambda prompts, groups: trajectory_of(
            prompts[2], groups[2], REWARDS[2], weights), beta=0.0, grad_clip=0.0)[0]
    local, both, total = gradient(1.0, 0.0), gradient(0.5, 2.0), gradient(0.0, 1.0)
    torch.testing.assert_close(both, 0.5 * local + 2 * total, atol=1e-5, rtol=1e-4)
    assert (local - total).abs().max() > 1e-3


def test_equal_outcomes_and_equal_rewards_change_nothing(tiny):
    gradient, metrics = step_of(tiny, grpo, 2, lambda prompts, groups: trajectory_of(prompts[2], groups[2], [0.5] * 4),
                                rewards=[[1.0] * 4] * 2)
    assert not gradient.any() and metrics["kl"] is None


@ALGORITHMS
def test_without_trajectories_nothing_changes(tiny, algorithm):
    """An output of weight 0 or an outcome without siblings adds no gradient to GRPO's; None is the old path."""
    policy = tiny()
    prompts, groups = sampled(policy)
    rewards, config = torch.tensor(REWARDS), algorithm.Config(**PLAIN)
    if algorithm is grpo:
        old = grpo.make_rollouts(policy, prompts, groups, rewards, config)
        alone = Played(prompts[:1], groups[0][:1], torch.ones(1), ["x"])
        more = grpo.make_rollouts(policy, prompts, groups, rewards, config, played=alone)
        assert old.advantages.equal(more.advantages) and old.kept_fraction == 1 and more.kept_fraction == 12 / 13
    else:
        *same, flat, weights = ppo.add_trajectories(prompts, groups, rewards)
        assert same == [prompts, groups] and flat.equal(rewards.flatten()) and weights.equal(torch.ones(12, 1))


def test_groups_of_different_sizes(tiny):
    policy, sizes = tiny(), (1, 4, 2)
    prompts, groups = sampled(policy, sizes=sizes)
    ids = [[one.ids for one in group] for group in groups]
    assert [list(rows) for rows in group_rows(ids)] == [[0], [1, 2, 3, 4], [5, 6]]

    def logp(*batch):
        return policy.score(*batch).logp
    together = policy.map_groups(logp, prompts, ids, 1)
    for rows, prompt, group in zip(group_rows(ids), prompts, ids, strict=True):
        alone = policy.map_groups(logp, [prompt], [group])
        torch.testing.assert_close(together[rows.start:rows.stop, :alone.shape[1]], alone, atol=1e-5, rtol=0)


def test_minibatches_count_rows():
    """Two groups of four and eight single outputs: a minibatch of "one group" has four rows or slightly more."""
    completions = [[[1]] * size for size in (4, 4, *[1] * 8)]
    rollouts = grpo.Rollouts([[i] for i in range(10)], completions, torch.arange(16.)[:, None], torch.arange(16.),
                             1.0, 1.0)
    found = list(minibatches(rollouts, 1, "seed"))
    rows = [sum(map(len, part.completions)) for part in found]
    assert sum(rows) == 16 and all(4 <= count < 8 for count in rows[:-1]) and len(found) < 5
    assert sorted(x for part in found for x in part.advantages.tolist()) == list(range(16))


# ------------------------------------------------------------------------------------------------ outcomes

def dialogue_of(*texts, questions=()):
    turns = tuple(Turn(f"t{i}", 1, "Ann", text, "1 May 2023") for i, text in enumerate(texts))
    return Dialogue("d", ("Ann", "Bob"), turns, questions)


def ask(name, evidence="", answer="x", asked_after=None):
    return Question(name, f"{name}?", answer, 4, tuple(f"t{i}" for i in evidence), asked_after)


def test_outcomes_by_turn_and_by_the_whole():
    dialogue = dialogue_of(*"abcd")
    scores = [(ask("a", "1"), 1.0), (ask("b", "20"), 0.5), (ask("c", "2"), 0.0), (ask("d"), 1.0)]
    assert outcomes(dialogue, scores, False) == {1: 1.0, 2: 0.25}, "the last evidence; turns 0 and 3 have no question"
    assert outcomes(dialogue, scores, True) == dict.fromkeys(range(4), 0.625)


@pytest.mark.parametrize("horizon, turns, kept", [(0, 4, "abcdef"), (4, 4, "abcdef"), (9, 4, "abcdef"), (3, 3, "abe"),
                                                  (1, 1, "a"), (2, 2, "ae")])
def test_a_horizon_keeps_the_questions_whose_evidence_it_holds(horizon, turns, kept):
    dialogue = dialogue_of(*"wxyz", questions=(ask("a", "0"), ask("b", "20"), ask("c", "13"), ask("d"),
                                              ask("e", "0", asked_after="t1"), ask("f", "", asked_after="t3")))
    found = cut(dialogue, horizon)
    assert len(found.turns) == turns and "".join(question.id for question in found.questions) == kept


@pytest.mark.parametrize("bank, words, wanted", [("a b c d", 4, 0.3), ("a b", 4, 0), ("", 3, 0),
                                                 ("a b c d e f", 2, 2.3)])
def test_words_above_seven_tenths_of_the_dialogue(bank, words, wanted):
    assert excess([SimpleNamespace(text=bank)], words) == pytest.approx(wanted)


def test_draw_repeats_a_small_data_set_only():
    rng = random.Random(0)
    assert sorted(draw(rng, "abc", 6)) == sorted("abcabc") and len({*draw(rng, "abcd", 3)}) == 3
    with pytest.raises(UsageError, match="raise --horizon or --window"):
        draw(rng, [], 1)


# ------------------------------------------------------------------------------------------------ the task

def task(*flags):
    args = train_manager.arguments([*SMALL, *map(str, flags)])
    policy = Policy.load(args.model)
    policy.add_adapter("manager", 4, 8)
    return train_manager.ManagerTask(policy, args)


def test_a_trajectory_is_reproduced_by_its_outputs(monkeypatch):
    """From an empty bank, each output turns the bank before its turn into the next. No known operation is read."""
    monkeypatch.setattr(manager, "oracle_edits", None)
    made = task("--horizon", 6, "--outcome", "whole", "--seed", 3)
    torch.manual_seed(0)
    episodes = made.batch(1)
    assert len(made.trajectories) == 6 and len(episodes) == 4
    for dialogue, build in made.trajectories:
        assert len(dialogue.turns) == len(build.history) == 6 and build.history[0] == []
        after = [*build.history[1:], list(build.bank)]
        for i, (_, prompt, completion) in enumerate(build.outputs):
            episode = made.make_episode(dialogue, i, [(m.text, m.speaker, m.time) for m in build.history[i]], ())
            assert episode.prompt == prompt
            edits = manager.parse(completion.text, episode.case) or []
            manager.apply_edits(episode.bank, edits, episode.turn.speaker, episode.turn.time)
            assert [memory.text for memory in episode.bank] == [memory.text for memory in after[i]]
    histories = [[(memory.text, memory.speaker) for memory in bank] for _, build in made.trajectories
                 for bank in build.history]
    assert all([(memory.text, memory.speaker) for memory in one.bank] in histories for one in episodes)
    assert len({str(list(build.bank)) for _, build in made.trajectories}) > 2, "they are sampled"
    played = made.played
    assert sorted(set(played.labels)) == [(c, i) for c in range(2) for i in range(6)]
    assert all(played.labels.count(label) == 3 for label in played.labels) and len(played.prompts) == 36
    with made.policy.using("manager"):
        logp = made.policy.score(played.prompts[:5], [[one.ids] for one in played.completions[:5]])[0]
    for row, one in zip(logp, played.completions, strict=False):
        assert row[:len(one.ids)].tolist() == pytest.approx(one.logps, abs=1e-4), "on-policy: the ratio is 1"
    _, metrics, _ = made.rewards(episodes, [[Completion([5], [0.0], True, "nonsense")] * 2] * 4)
    assert metrics["outcome"] == pytest.approx(played.rewards.mean().item()) and metrics["final_bank_size"] > 0


def two_turns(tmp_path):
    """A file with two turns of Ann: about her dog, asked by itself and together with the second, about her cat."""
    turns = [{"speaker": "Ann", "dia_id": f"D1:{i}", "text": text}
             for i, text in enumerate(["My dog is Rex.", "My cat is Tom."], 1)]
    questions = [{"question": text, "answer": gold, "category": 4, "evidence": evidence} for text, gold, evidence in (
        ("Which dog?", "Rex", ["D1:1"]), ("Which cat?", "Tom", ["D1:2"]), ("Which pets?", "Rex Tom", ["D1:1", "D1:2"]))]
    conversation = {"speaker_a": "Ann", "speaker_b": "Bob", "session_1": turns, "session_1_date_time": "8 May, 2023"}
    (tmp_path / "two.json").write_text(json.dumps([{"sample_id": "two", "qa": questions,
                                                    "conversation": conversation}]))
    return tmp_path / "two.json"


def played_by_hand(tmp_path, *flags):
    """A task with two trajectories: the first stores the dog, the second does not; then both store the cat."""
    made = task("--data", two_turns(tmp_path), "--no-extract", "--trajectories", 2, "--conversations", 1, *flags)

    def sample(prompts, n=1, *_, temperature=1.0):
        texts = [[made.policy.decode(prompt).rpartition("new facts")[2]] * n for prompt in prompts]
        stored = [[json.dumps([{"event": "ADD", "text": "dog Rex" if "Rex" in text else "cat Tom"}]) for text in group]
                  for group in texts]
        if "Rex" in texts[0][0] and n == 1:
            stored[1] = ['[{"event": "NOOP"}]']
        return [[Completion([5], [0.0], True, text) for text in group] for group in stored]
    made.policy.sample = sample

    def answers(asked):
        known = [" ".join(word for word in ("Rex", "Tom") if word in question.answer and any(
            word in memory.text for memory in bank)) for bank, question, _ in asked]
        return [(None, Answer(text, (), True)) for text in known]
    made.answers = answers
    return made, made.batch(1)


@pytest.mark.parametrize("outcome, rewards, at_cat", [("whole", {0: [1, 1 / 3], 1: [1, 1 / 3]}, [0.7071, -0.7071]),
                                                      ("turn", {0: [1, 0], 1: [1, 0.5]}, [0.7071, -0.7071])])
def test_a_difference_in_turn_1_also_credits_turn_2_but_not_in_the_local_group(tmp_path, outcome, rewards, at_cat):
    """Both trajectories write the same at turn 2. The global part rewards one and punishes the other for it."""
    made, _ = played_by_hand(tmp_path, "--outcome", outcome)
    played = made.played
    assert played.labels == [(0, 0), (0, 1), (0, 0), (0, 1)]
    found = {i: [played.rewards[n].item() for n in (i, i + 2)] for i in (0, 1)}
    assert found == {i: pytest.approx(wanted) for i, wanted in rewards.items()}
    assert played.completions[1].text == played.completions[3].text
    advantages = grpo.labelled_advantages(played.rewards, played.labels)
    assert advantages[[1, 3]].tolist() == pytest.approx(at_cat, abs=3e-4)
    for dialogue, build in made.trajectories:  # a local group at turn 2 from either bank: equal outputs, no credit
        memories = [(memory.text, memory.speaker, memory.time) for memory in build.history[1]]
        episode = made.make_episode(dialogue, 1, memories, dialogue.questions)
        group = made.policy.sample([episode.prompt], 4)
        assert not grpo.group_advantages(made.rewards([episode], group)[0]).any()


def test_steps_between_two_refreshes_have_the_local_part_alone_with_its_weight(tmp_path):
    made, _ = played_by_hand(tmp_path, "--local-weight", 0, "--refresh", 2)
    assert len(made.played.prompts) == 4
    episodes = made.batch(2)
    assert made.played.prompts == [] and made.played.weights == (0, 1)
    groups = [[Completion([5], [-1.0], True, text) for text in ('[{"event": "NOOP"}]', "nonsense")] for _ in episodes]
    rewards = torch.tensor([[1.0, 0.0]] * len(episodes))
    prompts, config = [one.prompt for one in episodes], grpo.Config(beta=0)
    assert grpo.make_rollouts(made.policy, prompts, groups, rewards, config, played=made.played) is None
    assert len(grpo.make_rollouts(made.policy, prompts, groups, rewards, config).advantages) == 2 * len(episodes)
    assert not ppo.add_trajectories(prompts, groups, rewards, made.played)[-1].any()


def test_the_compression_penalty_lowers_both_parts(tmp_path):
    """Final banks of 4 and 2 words, 8 words of dialogue: none has excess. With three times the words one has."""
    made, [episode, *_] = played_by_hand(tmp_path, "--outcome", "whole", "--compression-penalty", "0.5")
    assert made.played.rewards.tolist() == pytest.approx([1, 1, 1 / 3, 1 / 3])
    assert episode.words == 4 * (1 + (episode.turn.id == "D1:2"))
    episode = replace(episode, words=4)
    before = len(episode.bank)
    long = json.dumps([{"event": "ADD", "text": "Rex Tom " + "word " * 6}])
    rewards, *_ = made.rewards([episode], [[Completion([5], [0.0], True, text) for text in (long, "nonsense")]])
    words = 8 + 2 * before
    assert rewards.tolist() == [[pytest.approx(1 - 0.5 * (words / 4 - 0.7)), 0]]
    bank = episode.bank.fork()  # 20 words more: an invalid output leaves the excess, so it is not better than a NOOP
    bank.add("Rex Tom " + "word " * 18, episode.turn.speaker, "")
    outputs = [Completion([5], [0.0], True, text) for text in ('[{"event": "NOOP"}]', "nonsense")]
    rewards, *_ = made.rewards([replace(episode, bank=bank)], [outputs])
    excess = (20 + 2 * before) / 4 - 0.7
    assert rewards.tolist() == [pytest.approx([1 - 0.5 * excess, -0.5 * excess])]


# ------------------------------------------------------------------------------------------------ the script

@pytest.mark.parametrize("flags, message", [
    (["--bank", "trajectory", "--trajectories", "0"], "--bank trajectory needs --trajectories 1 or more"),
    (["--bank", "trajectory", "--algo", "sft"], "--bank trajectory needs --trajectories 1 or more, and --algo grpo"),
    (["--trajectories", "-1"], "--trajectories -1: must be at least 0"),
    (["--compression-penalty", "nan"], "--compression-penalty nan: must be a finite number"),
    (["--global-weight", "-0.5"], "--global-weight -0.5: must be at least 0")])
def test_wrong_flags(flags, message):
    with pytest.raises(UsageError, match=message):
        train_manager.arguments(flags)


def test_cloning_has_no_trajectories(capsys):
    with pytest.raises(SystemExit):
        train_manager.arguments(["--algo", "sft", "--trajectories", "2"])
    assert "--trajectories needs --algo grpo or ppo" in capsys.readouterr().err


def test_a_horizon_without_questions(tmp_path):
    entry, = json.loads(two_turns(tmp_path).read_text())
    entry["qa"] = entry["qa"][1:]
    (tmp_path / "late.json").write_text(json.dumps([entry]))
    with pytest.raises(UsageError, match="no question has its evidence within --horizon, so no turn can be scored"):
        task("--data", tmp_path / "late.json", "--no-extract", "--horizon", 1)


def test_the_count_of_links_ends_at_the_horizon(tmp_path, capsys):
    for horizon, asked in ((0, "3 of 3 questions score 2 turns"), (1, "1 of 3 questions score 1 turns")):
        task("--data", two_turns(tmp_path), "--no-extract", "--horizon", horizon)
        said = capsys.readouterr().out
        assert asked in said and ("2 with evidence after --horizon 1" in said) == (horizon == 1)


@ALGORITHMS
def test_a_resumed_run_continues_with_the_same_numbers(tmp_path, algorithm):
    def run(out, *more):
        train_manager.main([*SMALL, "--algo", algorithm.__name__, "--horizon", "6", "--refresh", "2", "--schedule",
                            "constant", "--checkpoint-every", "1", "--out", str(tmp_path / out), *more])
    run("whole", "--steps", "3")
    run("parts", "--steps", "1")  # between two refreshes: the banks come from the checkpoint
    run("parts", "--steps", "3", "--resume")
    whole, parts = files_of(tmp_path / "whole"), files_of(tmp_path / "parts")
    assert [row for row in parts[0] if "eval" not in row] == [row for row in whole[0] if "eval" not in row]
    assert whole[1:] == parts[1:] and [row["step"] for row in whole[0] if "outcome" in row] == [1, 3]
