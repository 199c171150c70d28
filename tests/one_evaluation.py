"""One evaluation of a tiny policy, its metrics and report: for tests in one process, and in several by torchrun.

As a script: `one_evaluation.py CASES.json OUT.json` runs every case, in whose folder the report's files are, and saves
what rank 0 saw.
"""

import json
import random
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from qlora_dpo import QLoRADPOConfig, QLoRADPOTrainer
from qlora_dpo.judge import judged

from tiny_chat import CHAT_ROWS, build_chat_tokenizer, build_tiny_llama, ranked_row

RANKED = [ranked_row(seed, count) for seed, count in enumerate([3, 5, 2, 4, 3])]
ROWS = {
    "pairs": [row | {"subset": "abc"[i % 3], "label_probs": [0.9, 0.6, 1.0][i % 3]} for i, row in enumerate(CHAT_ROWS)],
    "ranked": [row | {"subset": "ab"[i % 2]} for i, row in enumerate(RANKED)],
}


def one_evaluation(folder, rows, batch_size=1, shuffled=None, **options):
    """Metrics and report, whose files are in the folder; the rows shuffled by a seed if one is given."""
    tokenizer = build_chat_tokenizer()
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    policy = get_peft_model(build_tiny_llama(tokenizer), lora)
    rows = list(ROWS[rows])
    if shuffled is not None:
        random.Random(shuffled).shuffle(rows)
    args = QLoRADPOConfig(
        output_dir=folder,
        reference="base",
        per_device_eval_batch_size=batch_size,
        report_to=[],
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
        **options,
    )
    trainer = QLoRADPOTrainer(policy, args=args, eval_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    metrics = trainer.evaluate()
    return metrics, judged(trainer, "rows", folder).to_dict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        metrics, report = one_evaluation(**case)
        found.append({"metrics": metrics, "report": report, "world": torch.distributed.get_world_size()})
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
