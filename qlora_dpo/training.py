"""The training half of the trainer: micro-batches, the optimizer step over all its pairs, and what is logged of it."""

import contextlib
import copy
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import Trainer

from qlora_dpo.budget import Rescue
from qlora_dpo.callbacks import KeepLayers, SyncReference
from qlora_dpo.memory import GIB, peak_memory
from qlora_dpo.metrics import RunningSums, summarize
from qlora_dpo.migration import TrlNames
from qlora_dpo.offload import activations_moved
from qlora_dpo.sampling import FilledStream, filled, replaced
from qlora_dpo.step import RandomState, Step

SUMS_NAME = "log_sums.json"
"""What a checkpoint keeps of the pairs that the log has not shown yet."""


class StepTrainer(TrlNames, Trainer):
    """A `Trainer` that minimises the mean of a step's losses over all pairs of the optimizer step.

    Args:
        step: Scores batches and turns them into losses.
        **kwargs: `Trainer`'s own; its collator is a `GroupCollator`.
    """

    def __init__(self, step: Step, **kwargs: Any) -> None:
        self.step = step
        self.sync: SyncReference | None = None
        self.forget_log()
        self._next: list[dict[str, Any]] = []
        self._step_tokens = 0
        self._began_at: int | None = None
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is scaled here, by the number of pairs in the step
        alone = self.args.world_size == 1
        self.kept = KeepLayers(self.model.get_base_model())
        self._rescue = Rescue(self.data_collator, self._restart, self._give_up, self.kept.keep_fewer, alone)

    def forget_log(self) -> None:
        """Let the next log line pool what comes from here on."""
        self._sums, self._last_log = RunningSums(), time.perf_counter()

    def save_log_state(self, folder: Path) -> None:
        """Keep in a checkpoint what the next log line will pool, of all processes."""
        sums = self._sums.state()
        if self.args.should_save:
            Path(folder, SUMS_NAME).write_text(json.dumps(sums))

    def load_log_state(self, folder: Path) -> None:
        """Let the next log line pool what it would have, had the run not been stopped."""
        path = Path(folder, SUMS_NAME)
        if self.args.process_index == 0 and path.is_file():  # the sums are added up over processes
            self._sums.load(json.loads(path.read_text()))

    @contextlib.contextmanager
    def not_training(self) -> Iterator[None]:
        """Leave the block out of the training: its time, of the speed that the log shows, and its random numbers.

        Iterating over a data set draws one, so that dropout would fall in another way behind an evaluation.
        """
        last_log, start = self._last_log, time.perf_counter()
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            yield
        self._last_log = last_log + time.perf_counter() - start

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`'s, with fillers instead of repeated groups where several processes train or read a stream."""
        trains, several = kwargs.get("is_training", False), self.args.world_size > 1
        drops = trains and self.args.dataloader_drop_last  # every pair is evaluated
        multiple = kwargs["batch_size"] * self.args.world_size
        if isinstance(dataset, IterableDataset) and (several or drops):
            dataset = FilledStream(dataset, multiple, drops)
        with replaced(self.args, "dataloader_drop_last", drops):
            if not (trains and several and isinstance(dataset, Dataset)) or drops:
                return super()._get_dataloader(dataset, *args, **kwargs)
            dataset, sampler = filled(dataset, kwargs["sampler_fn"], multiple, self.args.data_seed)
            loader = super()._get_dataloader(dataset, *args, **(kwargs | {"sampler_fn": lambda _: sampler}))
        loader.batch_sampler.sampler = sampler  # where a resumed epoch is looked for
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As `Trainer`'s, whose lasting workers would serve one set's rows for another that is passed."""
        own = eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset
        with replaced(self.args, "dataloader_persistent_workers", own and self.args.dataloader_persistent_workers):
            return super().get_eval_dataloader(eval_dataset)

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Any]], Any]:
        """The micro-batches of an optimizer step and its number of items.

        The step begins with the first `training_step`: a run that goes on gets its random numbers back in between.
        """
        samples, items = super().get_batch_samples(*args)
        self._next = samples
        return samples, items

    def _begin(self, samples: list[dict[str, Any]]) -> None:
        """Remember how things are before a step, which may have to start again."""
        random = RandomState.of(self.args.device)
        self._before = copy.copy(self._sums), copy.copy(self.step.bco_delta), random
        self._rescue.begin(samples)

    @contextlib.contextmanager
    def as_before_the_step(self) -> Iterator[None]:
        """Within the block, what a step under way has counted and drawn is undone, as it has not moved the weights yet.

        transformers makes the checkpoint of a signal in the middle of a step.
        """
        began = self._began_at == self.state.global_step
        now = self._sums, self.step.bco_delta, self.state.num_input_tokens_seen, RandomState.of(self.args.device)
        if began or self._next:  # their tokens are counted when they are fetched
            self.state.num_input_tokens_seen -= self._step_tokens
        if began:
            self._sums, self.step.bco_delta, random = self._before
            random.restore(self.args.device)
        yield
        self._sums, self.step.bco_delta, self.state.num_input_tokens_seen, random = now
        random.restore(self.args.device)

    def _restart(self) -> None:
        """Put back how things were before the step."""
        self.model.zero_grad()
        sums, delta, random = self._before
        self._sums, self.step.bco_delta = copy.copy(sums), copy.copy(delta)
        random.restore(self.args.device)

    def _give_up(self) -> None:
        """Keep what was trained before an error that ends the run."""
        if self.state.global_step > 0:
            self._save_checkpoint(self.model, trial=None)

    def _score_coupled(self) -> None:
        """The first of two stages for all micro-batches of a step whose pairs are coupled."""
        batches = [piece for sample in self._rescue.samples for piece in sample["pieces"]]
        alone = len(batches) == 1 and "parts" not in batches[0] and self.args.world_size == 1
        if batches and self.step.objective.coupled and (not alone or self.step.objective.bco_running_mean):
            self._first_stage(self.model_wrapped, batches)

    def _first_stage(self, model: nn.Module, batches: list[dict[str, Any]]) -> None:
        """Score batches without gradient, and count their pairs."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # one without a schedule has other weights in place since an evaluation
        with self.compute_loss_context_manager():
            prepared = self._prepare_inputs(batches)
            tables = self.step.first_stage(model, prepared)
        for batch, found, table in zip(batches, prepared, tables, strict=True):
            batch.update(found)
            self._sums.add(table, batch["num_unique_tokens"])

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch; where memory runs out, the optimizer step again in smaller pieces."""
        if self._next and inputs is self._next[0]:
            if self._began_at == self.state.global_step:
                self.model.zero_grad()  # of micro-batches that no step took, as where a stream ends within one
            self._began_at = self.state.global_step
            self._begin(self._next)
            self._next = []
            self._rescue.run(self._score_coupled)
        elif not any(sample is inputs for sample in self._rescue.samples):
            self._begin([inputs])

        def earlier() -> None:
            self._score_coupled()
            for sample in self._rescue.samples:
                if sample is inputs:
                    break
                self._micro_batch(model, sample, num_items_in_batch)

        return self._rescue.run(lambda: self._micro_batch(model, inputs, num_items_in_batch), earlier)

    def _micro_batch(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None) -> Tensor:
        """Forward and backward, one forward within the token budget at a time."""
        for piece in inputs["pieces"]:
            if "parts" in piece and "slopes" not in piece["parts"][0]:
                self._first_stage(model, [piece])
        work = [part for piece in inputs["pieces"] for part in piece.get("parts", [piece])]
        loss = torch.zeros((), device=self.args.device)
        for number, part in enumerate(work, start=1):
            last = number == len(work)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                loss = loss + super().training_step(model, part, num_items_in_batch)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """A batch's share of the step's loss, which is the mean over all pairs of the step.

        `num_items_in_batch` is the number of pairs of the optimizer step, over all micro-batches and processes; DDP
        averages gradients over processes, so each one's share is multiplied by their number.
        """
        outputs: dict[str, Any] = {}
        with activations_moved(self.model) if self.args.activation_offloading else contextlib.nullcontext():
            if "slopes" in inputs:
                total = self.step.second_stage(model, inputs)
            else:
                losses, table = self.step.losses(model, inputs)
                total, outputs = losses.sum(), {"losses": losses, "pairs": table}
                if model.training:
                    self._sums.add(table, inputs["num_unique_tokens"])
        items = max(self._items([inputs]), 1) if num_items_in_batch is None else num_items_in_batch
        processes = 1 if num_items_in_batch is None else self.accelerator.num_processes
        loss = total / items * processes
        return (loss, outputs) if return_outputs else loss

    def _items(self, batches: Iterable[dict[str, Any]]) -> int:
        """Items of the mean loss in batches: their pairs, or their groups that have one."""
        if not self.step.objective.counts_groups:
            return sum(len(batch["rows"]) for batch in batches)
        return sum(len(set(batch["group"][batch["yw_idxs"]].tolist())) for batch in batches)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """Items in an optimizer step, over its micro-batches and all processes; its tokens are counted beside them.

        Tokens are counted as TRL does, both sides with their prompt, where checkpoints keep the count.
        """
        pieces = [piece for sample in batch_samples for piece in sample["pieces"]]
        items, tokens = self._items(pieces), sum(piece["num_tokens"] for piece in pieces)
        if self.args.world_size > 1:
            counts = torch.tensor([items, tokens], device=device)
            items, tokens = self.accelerator.reduce(counts, reduction="sum").tolist()
        self._step_tokens = int(tokens)
        self.state.num_input_tokens_seen += self._step_tokens
        return max(items, 1)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 operations per parameter and token placed, as `Trainer` estimates them."""
        tokens = sum(piece["num_unique_tokens"] for piece in inputs["pieces"])
        return 6 * tokens * self.model.num_parameters(exclude_embeddings=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the metrics of all pairs since the last line."""
        if "loss" in logs:
            logs.update(self._training_metrics())
        super().log(logs, start_time)

    def _training_metrics(self) -> dict[str, float]:
        taken = self._sums.take()
        if taken is None:
            return {}
        sums, pairs, unique_tokens = taken
        now = time.perf_counter()
        seconds, self._last_log = now - self._last_log, now
        moved = {} if self.sync is None else {"reference/rank_error": self.sync.reference.error}
        speed = {"tokens_per_second": unique_tokens / seconds, "pairs_per_second": pairs / seconds}
        speed["peak_memory_gib"] = peak_memory(self.args.device) / GIB
        counts = {"num_tokens": self.state.num_input_tokens_seen, "num_unique_tokens": unique_tokens}
        return summarize(sums, pairs) | moved | counts | speed

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Nothing: `_get_num_items_in_batch` counts the tokens of all processes."""
