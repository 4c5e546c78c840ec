"""A toy task that an algorithm learns in seconds: reply to a greeting with a capital letter."""
import tempfile

import torch
import transformers

from data import TINY
from support.cli import Parser
from support.loop import fit
from support.run import Run


class Toy:
    """The reward is 1 for a reply that begins with a capital letter, which the tiny model rarely writes."""
    state: dict = {}
    played = None

    def __init__(self, policy):
        self.prompt = policy.encode([{"role": "user", "content": "Hello."}])

    def batch(self, step: int) -> list:
        return [self] * 4

    def rewards(self, episodes, groups):
        return torch.tensor([[float(one.text.strip()[:1].isupper()) for one in group] for group in groups]), {}, []

    def evaluate(self, when: str, step: int) -> list[dict]:
        return []


def show_toy(name: str, train, config, load_policy, argv=None) -> None:
    """Train on the toy and print completions before and after. `load_policy(TINY)` loads the tiny model."""
    Parser(description=f"{name} learns a toy on the tiny model, in seconds: to begin with a capital letter.",
           epilog="For the agents see train_manager.py and train_answer.py.").parse_args(argv)
    transformers.set_seed(0)
    policy = load_policy(TINY)
    policy.add_adapter("toy")
    task = Toy(policy)
    before = policy.sample([task.prompt], 4, config.max_new_tokens)[0]
    with tempfile.TemporaryDirectory() as folder:
        fit(train, policy, task, Run(folder, vars(config)), "toy", config)
    with policy.using("toy"):
        after = policy.sample([task.prompt], 4, config.max_new_tokens)[0]
    for when, group in (("untrained", before), ("trained", after)):
        print(f"{when:9}  {'   '.join(repr(' '.join(one.text.split())) for one in group)}")
