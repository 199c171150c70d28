"""Random groups of every awkward length."""

import random

from qlora_dpo.layouts import Group


def random_groups(seed, scale=1):
    """Four groups; the first prompt has one token, and so has some completion, which then places none of its own.

    Other prompts have up to 9 tokens and other completions up to 7, times `scale`.
    """
    draw = random.Random(seed)
    groups = []
    for number in range(4):
        prompt = 1 if number == 0 else draw.randint(1, 9 * scale)
        lengths = [draw.choice([1, 2, draw.randint(1, 7 * scale)]) for _ in range(draw.randint(2, 4))]
        if number == 1:
            lengths[0] = 1
        completions = [[draw.randint(3, 50) for _ in range(n)] for n in lengths]
        groups.append(Group([draw.randint(3, 50) for _ in range(prompt)], completions, [(0, 1)], number))
    return groups
