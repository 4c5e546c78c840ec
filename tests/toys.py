"""A toy policy and a toy task that algorithms learn within seconds, and what a run leaves in its folder."""
import random
from types import SimpleNamespace

import torch
import transformers
from tiny_models import wake_adapter

from policy import Policy
from support.loop import fit
from support.run import Run, read_rows


def letter_policy(folder, std=0.2):
    """The model that spells letter by letter, with one adapter, "agent", that already changes something if std > 0."""
    torch.set_num_threads(1)
    policy = Policy.load(folder, device="cpu")
    torch.manual_seed(1)
    policy.add_adapter("agent", rank=4, alpha=8)
    wake_adapter(policy, "agent", std)
    return policy


def encode_texts(policy, texts):
    return [policy.encode([{"role": "user", "content": text}]) for text in texts]


class Letters:
    """
    A toy task: the reward is the fraction of a completion's letters that are e. `events` are functions by place and
    step, ("batch", 3) for example, that are called there; one at "rewards" may return other rewards.
    """

    played = None

    def __init__(self, policy, events=None, num_prompts=4):
        self.policy, self.events, self.num_prompts = policy, events or {}, num_prompts
        self.seen, self.state = [], {"passed": []}  # steps of this process; steps of the run
        self.letter, = encode_texts(policy, "e")[0][1:2]

    def call(self, place, step, rewards=None):
        return self.events.get((place, step), lambda rewards: None)(rewards)

    def batch(self, step):
        self.seen.append(step)
        self.state = {"passed": [*self.state["passed"], step]}
        self.call("batch", step)
        rng = random.Random(step)
        texts = ["".join(rng.choices("abc ", k=rng.randint(1, 9))) for _ in range(self.num_prompts)]
        return [SimpleNamespace(prompt=prompt) for prompt in encode_texts(self.policy, texts)]

    def rewards(self, episodes, groups):
        rewards = torch.tensor([[c.ids.count(self.letter) / len(c.ids) for c in group] for group in groups])
        changed = self.call("rewards", self.seen[-1], rewards)
        samples = [{"prompt": "p", "completion": group[0].text} for group in groups]
        return rewards if changed is None else changed, {"invalid_rate": 0.0}, samples

    def evaluate(self, when, step):
        self.call("evaluate", step)
        return [{"step": step, "eval": when, "n": 1, "em": 0.0, "drawn": torch.rand(1).item()}]


def run_letters(policy, folder, algorithm, events=None, resume=False, **settings):
    """A whole run on the toy, as a script does it; returns its task. A UsageError or a kill passes through."""
    config = algorithm.Config(**dict(steps=6, lr=1e-2, warmup=2, group_size=4, max_new_tokens=6, minibatch=2,
                                     checkpoint_every=1) | settings)
    transformers.set_seed(5)
    task = Letters(policy, events)
    fit(algorithm.train, policy, task, Run(folder, vars(config), resume=resume), "agent", config)
    return task


def stop(_):
    raise KeyboardInterrupt


def rows_of(folder):
    """The lines of metrics.jsonl without the seconds."""
    return [{**row, "seconds": 0} for row in read_rows(folder / "metrics.jsonl")]


def files_of(folder):
    """Everything of a run that must not depend on how often it was stopped; samples and adapter to the byte."""
    return rows_of(folder), *((folder / name).read_bytes() for name in (
        "samples.jsonl", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"))
