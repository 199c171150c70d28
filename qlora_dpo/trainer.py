"""`QLoRADPOTrainer`: a `transformers.Trainer` whose step reads like the DPO paper."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, denumpify_detensorize

from qlora_dpo.arguments import check_arguments, policy_from, tokenizer_from, warn_of_router
from qlora_dpo.config import QLoRADPOConfig
from qlora_dpo.data import DataReport, prepare_dataset, show
from qlora_dpo.evaluation import PairRecords
from qlora_dpo.forward import disable_dropout, install_scoring, score_batch
from qlora_dpo.layouts import Group, GroupCollator, group_of
from qlora_dpo.losses import LOSSES, Scores
from qlora_dpo.metrics import RunningSums, pair_table, preference_metrics, summarize
from qlora_dpo.model import is_fresh, keep_one_arithmetic
from qlora_dpo.proof import (
    LayoutProof,
    attention_span,
    beyond_window,
    check_logit_rule,
    check_start,
    check_vocabulary,
    choose_layout,
    extreme_groups,
)
from qlora_dpo.record import write_record
from qlora_dpo.reference import BaseReference, make_reference

PROOF_SAMPLE = 2048
PROOF_STREAM_SAMPLE = 16
"""Groups among which the longest is looked for, of a data set and of a stream, to prove the layout on."""


class QLoRADPOTrainer(Trainer):
    """Trains LoRA adapters on a (4-bit) base by Direct Preference Optimization.

    The constructor is that of TRL's `DPOTrainer`. Logging, checkpoints, resuming, callbacks and progress bars are
    `transformers.Trainer`'s own.

    Args:
        model: Hub id or folder (loaded in NF4 unless `quantization_config` says otherwise, with default LoRA unless
            `peft_config` is given), a `PreTrainedModel` (needs `peft_config`) or a `PeftModel`, trained as it is.
        ref_model: Must be None: the reference is the model itself with its adapters disabled.
        args: The configuration; None for the defaults.
        data_collator: Must be None or a `GroupCollator`.
        train_dataset: Preference rows in any form `preferences.parse_row` accepts.
        eval_dataset: The same, or several by name.
        processing_class: The tokenizer; None to load it from the model's folder or id.
        compute_metrics: Called once per evaluation with `EvalPrediction(predictions=(chosen, rejected) rewards `(T,)`
            each, label_ids=row ids `(T,)`)`; None for the package's `evaluate` modules.
        callbacks: As in `Trainer`.
        optimizers: As in `Trainer`.
        quantization_config: How to quantise a model given as a string.
        peft_config: The adapter to attach.

    Raises:
        ValueError: For data or models that cannot be trained, before anything is.
        NotImplementedError: For what is not built yet.

    Source: Rafailov et al. 2023, arXiv:2305.18290; Dettmers et al. 2023, arXiv:2305.14314.
    """

    _tag_names = ["qlora-dpo", "dpo"]
    eval_dataset: Any

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: QLoRADPOConfig | None = None,
        data_collator: GroupCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        args = args or QLoRADPOConfig(output_dir="qlora-dpo-output")
        check_arguments(ref_model, args, data_collator, train_dataset, eval_dataset)
        set_seed(args.seed)  # the adapter's A matrices are random
        policy = policy_from(model, args, quantization_config, peft_config)
        tokenizer = tokenizer_from(model, policy, args, processing_class)
        keep_one_arithmetic(policy)
        if args.disable_dropout:
            disable_dropout(policy)
        if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            policy.enable_input_require_grads()  # the reentrant kind sees no gradient behind frozen embeddings
        warn_of_router(policy, args)
        install_scoring(policy.get_base_model())
        self.reference = make_reference(args.reference, policy, args.logps_chunk_size)
        self.starts_at_reference = isinstance(self.reference, BaseReference) and is_fresh(policy)
        self._start_checked = False
        self.loss = LOSSES[args.loss_type[0]]
        args.accelerator_config.dispatch_batches = False  # it would cut a stream's tensors by their first size
        self.data_reports: dict[str, DataReport] = {}
        self.layout_proof: LayoutProof | None = None
        self._proven = False
        self._sums = RunningSums()
        self._records: PairRecords | None = None
        self._last_log = time.perf_counter()
        self._options: dict[str, Any] = {
            "tokenizer": tokenizer,
            "limits": args.token_limits,
            "pair_strategy": args.pair_strategy,
            "num_proc": args.dataset_num_proc,
            "batch_size": args.per_device_train_batch_size,
        }
        super().__init__(
            model=policy,
            args=args,
            data_collator=data_collator or GroupCollator(tokenizer.pad_token_id),
            train_dataset=None if train_dataset is None else self._prepared(train_dataset, "train", args),
            eval_dataset=None if eval_dataset is None else self._prepared_eval(eval_dataset, args),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.n_gpu > 1:
            raise ValueError(
                f"One process must see one GPU, got {args.n_gpu}: their batches cannot be split. Start one process "
                "per GPU with torchrun or accelerate, or set CUDA_VISIBLE_DEVICES=0."
            )
        self._signature_columns = ["prompt_ids", "completion_ids", "pairs", "row"]
        self.model_accepts_loss_kwargs = True  # the loss is scaled here, by the number of pairs in the step
        self.can_return_loss = True
        self.model.get_base_model().add_model_tags(self._tag_names)

    # ---- data ----------------------------------------------------------------------------------------------------

    def _prepared(self, dataset: Any, name: str, args: QLoRADPOConfig) -> Any:
        """The data set tokenised, its report shown."""
        if not isinstance(dataset, (Dataset, IterableDataset)):
            raise TypeError(
                f"A data set must be a datasets.Dataset, got {type(dataset).__name__}. Use Dataset.from_list."
            )
        with args.main_process_first(desc="tokenising"):
            prepared, report = prepare_dataset(dataset, name=name, **self._options)
        if report is not None:
            self.data_reports[name] = report
            if args.process_index == 0:
                show(report)
        return prepared

    def _prepared_eval(self, dataset: Any, args: QLoRADPOConfig) -> Any:
        if isinstance(dataset, Mapping):
            return {name: self._prepared(one, name, args) for name, one in dataset.items()}
        return self._prepared(dataset, "eval", args)

    # ---- what is checked before the first number is used ---------------------------------------------------------

    def _prove(self) -> None:
        """Check the model's logits and vocabulary, and choose the layout, once."""
        if self._proven:
            return
        groups, device = extreme_groups(self._some_groups()), self.args.device
        base = self.model.get_base_model()
        check_vocabulary(base.get_input_embeddings().weight.shape[0], groups)
        with self.accelerator.autocast():
            check_logit_rule(self.model, [*groups[0].prompt_ids, *groups[0].completion_ids[0]], device)
            probe = beyond_window(groups, attention_span(base.config.get_text_config()), self.args.max_length)
            layout, self.layout_proof = choose_layout(self.model, probe, self.args.batch_layout, device)
        self.data_collator.layout = layout
        self._proven = True

    def _check_start(self) -> None:
        """Check, once, that a policy that was fresh when it came starts training at its reference."""
        if self.starts_at_reference and not self._start_checked:
            groups, layout = extreme_groups(self._some_groups()), self.data_collator.layout
            with self.accelerator.autocast():
                check_start(self.model, self.reference, groups, layout, self.args.device, self.args.logps_chunk_size)
        self._start_checked = True

    def _some_groups(self) -> list[Group]:
        """The first groups of the data at hand.

        Raises:
            ValueError: If a stream has none.
        """
        dataset = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        if isinstance(dataset, Mapping):
            dataset = next(iter(dataset.values()))
        if isinstance(dataset, IterableDataset):
            rows = list(dataset.take(PROOF_STREAM_SAMPLE))
        else:
            rows = list(dataset.select(range(min(len(dataset), PROOF_SAMPLE))))
        if not rows:
            raise ValueError("The stream must keep at least one row, got none. Check its rows and `max_length`.")
        return [group_of(row) for row in rows]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, after the checks on logits, layout and start."""
        if self.train_dataset is None:
            raise ValueError("`train_dataset` must be given to train, got None. Pass it to the trainer.")
        self._prove()
        self._check_start()
        self._unprepare()
        self._last_log = time.perf_counter()
        return super().train(*args, **kwargs)

    def _unprepare(self) -> None:
        """Let training wrap the model anew: an evaluation before it leaves it marked as prepared, without DDP."""
        if self.args.world_size > 1 and self.model_wrapped is self.model:
            self.model.__dict__.pop("_is_accelerate_prepared", None)
            self.accelerator._models.clear()

    # ---- the step ------------------------------------------------------------------------------------------------

    def _scores(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Scores, dict[str, Tensor]]:
        """Log-probabilities of a batch under reference and policy, and the statistics of the policy's tokens."""
        ref_logps = self.reference(model, batch)
        policy = score_batch(model, batch, statistics=True, chunk_size=self.args.logps_chunk_size)
        scores = Scores(
            pi_logps=policy["logps"],
            ref_logps=ref_logps,
            yw_idxs=batch["yw_idxs"],
            yl_idxs=batch["yl_idxs"],
            lengths=torch.tensor(batch["lengths"], device=ref_logps.device),
            group=batch["group"],
        )
        return scores, policy

    def _pair_losses(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """`(T,)` losses of a batch's pairs, and its pair table."""
        scores, statistics = self._scores(model, batch)
        losses = self.loss(scores, **self.args.loss_hyperparameters)
        return losses, pair_table(scores, losses, statistics, self.args.beta)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This batch's share of the step's loss, which is the mean over all pairs of the step.

        `num_items_in_batch` is the number of pairs of the optimizer step, over all micro-batches and processes; DDP
        averages gradients over processes, so each one's share is multiplied by their number.
        """
        losses, table = self._pair_losses(model, inputs)
        if self.model.training:
            self._sums.add(table, inputs["num_unique_tokens"])
        pairs = len(losses) if num_items_in_batch is None else num_items_in_batch
        processes = 1 if num_items_in_batch is None else self.accelerator.num_processes
        loss = losses.sum() / pairs * processes
        return (loss, {"losses": losses, "pairs": table}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """Pairs in an optimizer step, over its micro-batches and all processes."""
        pairs = sum(len(batch["rows"]) for batch in batch_samples)
        if self.args.world_size == 1:
            return pairs
        return self.accelerator.reduce(torch.tensor(pairs, device=device), reduction="sum")

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
        return summarize(sums, pairs) | {
            "num_tokens": self._tokens_seen(),
            "num_unique_tokens": unique_tokens,
            "tokens_per_second": unique_tokens / seconds,
            "pairs_per_second": pairs / seconds,
        }

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count tokens as TRL does, both sides with their prompt, where checkpoints keep the count."""
        self.state.num_input_tokens_seen += inputs["num_tokens"]

    def _tokens_seen(self) -> int:
        seen = self.state.num_input_tokens_seen
        if self.args.world_size == 1:
            return seen
        return int(self.accelerator.reduce(torch.tensor(seen, device=self.args.device), reduction="sum"))

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Preference accuracy, margins and loss, exact per pair over the data set.

        Args:
            eval_dataset: Rows in any accepted form, several sets by name, or the name of one; None for the trainer's.
            ignore_keys: As in `Trainer`.
            metric_key_prefix: First part of every key.

        Returns:
            Metrics by key; `eval_<name>_...` for named sets.
        """
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepared_eval(eval_dataset, self.args)
        if eval_dataset is None and self.eval_dataset is None:
            raise ValueError("`eval_dataset` must be given to evaluate, got None. Pass it here or to the trainer.")
        self._prove()
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Trainer's loop, with metrics from the rows of the pair table instead of means of batch means."""
        start = time.perf_counter()
        self._records = PairRecords()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        records = self._records.gathered()
        self._records = None
        metrics = records.metrics() | {"num_tokens": self._tokens_seen()}
        prediction = EvalPrediction(
            predictions=(records.column("reward_chosen"), records.column("reward_rejected")), label_ids=records.rows()
        )
        if self.compute_metrics is None:
            metrics |= preference_metrics(*prediction.predictions)
        else:
            metrics |= self.compute_metrics(prediction)
        first = f"{metric_key_prefix}_"
        named = {key if key.startswith(first) else first + key: value for key, value in metrics.items()}
        self._last_log += time.perf_counter() - start  # not training time
        return output._replace(
            predictions=prediction.predictions,
            label_ids=prediction.label_ids,
            metrics={**(output.metrics or {}), **denumpify_detensorize(named)},
            num_samples=len(records),
        )

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """As `Trainer.predict`: `predictions` are `(T,)` chosen and `(T,)` rejected rewards, `label_ids` the rows."""
        prepared = self._prepared(test_dataset, metric_key_prefix, self.args)
        self._prove()
        return super().predict(prepared, ignore_keys, metric_key_prefix)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Score a batch without gradient and keep its pairs."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, table = self._pair_losses(model, inputs)
        if self._records is not None:
            self._records.add(table, inputs["rows"], inputs["pair_ids"])
        return losses.mean(), None, None

    # ---- saving --------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save adapter, tokenizer and `qlora_dpo.json`; never the arguments, which may hold a Hub token."""
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        self.model.save_pretrained(folder, state_dict=state_dict)
        self.processing_class.save_pretrained(folder)
        write_record(folder, self.model, self.args, self.reference.kind)
