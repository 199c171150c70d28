"""`QLoRADPOTrainer`: a `transformers.Trainer` whose step reads like the DPO paper."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, denumpify_detensorize

from qlora_dpo.adapters import require_trainable
from qlora_dpo.arguments import (
    Preparation,
    announce,
    check_arguments,
    check_best_metric,
    measured,
    policy_from,
    reference_from,
    require_named,
    require_own_folder,
    require_shardable,
    result_name,
    router_coefficient,
    settle,
    tell_what_metrics_get,
    tokenizer_from,
    use_liger,
)
from qlora_dpo.budget import Rescue, forwards_of, longest_rows
from qlora_dpo.callbacks import SyncReference, WatchPreferences
from qlora_dpo.checkpoints import checkpoint_to_resume, warn_of_others
from qlora_dpo.config import QLoRADPOConfig
from qlora_dpo.data import GROUP_COLUMNS, VALUE_COLUMNS, as_named
from qlora_dpo.errors import FixableError, memory_said
from qlora_dpo.evaluation import GatheredPairs, PairRecords
from qlora_dpo.forward import disable_dropout, prepare_policy
from qlora_dpo.generations import GENERATIONS_NAME, SampleGenerations
from qlora_dpo.layouts import Group, GroupCollator
from qlora_dpo.memory import weight_bytes
from qlora_dpo.metrics import preference_metrics
from qlora_dpo.migration import check_callbacks, check_overrides
from qlora_dpo.model import keep_one_arithmetic
from qlora_dpo.precomputed import CachedReference, cached_reference, precompute
from qlora_dpo.progress import with_preferences
from qlora_dpo.proof import LayoutProof, check_start, prove_models, sample_groups
from qlora_dpo.recompute import checkpoint_activations, keep_activations
from qlora_dpo.record import evaluations_of, read_record
from qlora_dpo.reference import GIVEN, AverageReference, LiveReference, ModelReference, starts_at, warn_of_itself
from qlora_dpo.remembered import Remembered
from qlora_dpo.resuming import check_same_run, check_within_first_pass, run_facts
from qlora_dpo.room import budget_for, kept_layers_for, spare_host_memory
from qlora_dpo.sampling import replaced
from qlora_dpo.saving import SavingTrainer
from qlora_dpo.step import Step
from qlora_dpo.weights import require_saved_vocabulary


class QLoRADPOTrainer(SavingTrainer):
    """Trains LoRA adapters on a (4-bit) base by Direct Preference Optimization.

    The constructor is that of TRL's `DPOTrainer`. Logging, checkpoints, resuming, callbacks and progress bars are
    `transformers.Trainer`'s own.

    Args:
        model: Hub id or folder (loaded in NF4 unless `quantization_config` says otherwise, with default LoRA unless
            `peft_config` is given), a `PreTrainedModel` (needs `peft_config`) or a `PeftModel`, trained as it is.
        ref_model: A model of its own to compare with, or the path or id of one or of an adapter; None for what
            `args.reference` says.
        args: The configuration; None for the defaults.
        data_collator: Must be None or a `GroupCollator`.
        train_dataset: Preference rows in any form `preferences.parse_row` accepts.
        eval_dataset: The same, or several by name.
        processing_class: The tokenizer; None to load it from the model's folder or id.
        compute_metrics: Called once per evaluation with `EvalPrediction(predictions=(chosen, rejected) rewards `(T,)`
            each, label_ids=row ids `(T,)`)`; None for the package's `evaluate` modules.
        callbacks, optimizers: As in `Trainer`.
        quantization_config: How to quantise a model given as a string.
        peft_config: The adapter to attach.

    Raises:
        ValueError: For data or models that cannot be trained, before anything is.
        NotImplementedError: For what is not built yet.

    Source: Rafailov et al. 2023, arXiv:2305.18290; Dettmers et al. 2023, arXiv:2305.14314.
    """

    _tag_names = ["qlora-dpo", "dpo"]
    eval_dataset: Any
    layout_proof: LayoutProof | None = None
    last_pairs: GatheredPairs | None = None
    _proven = False
    _start_checked = False
    _records: PairRecords | None = None
    _remembered: Remembered | None = None

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | str | None = None,
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
        check_overrides(type(self))
        check_callbacks(callbacks)
        args = args or QLoRADPOConfig(output_dir="qlora-dpo-output")
        check_arguments(ref_model, args, data_collator, train_dataset, eval_dataset)
        check_best_metric(args, eval_dataset, compute_metrics is not None)
        objective = args.objective
        set_seed(args.seed)  # the adapter's A matrices are random
        policy = policy_from(model, args, quantization_config, peft_config)
        tokenizer = tokenizer_from(model, policy, args, processing_class)
        _set_up(policy, args)
        reference = reference_from(policy, ref_model, args)
        if args.use_liger_kernel and isinstance(reference, ModelReference):
            use_liger(reference.model, args)
        if train_dataset is not None:
            require_trainable(policy)
            require_saved_vocabulary(policy)
            require_own_folder(args, policy, reference)
        step = Step(reference, objective, args.beta, args.logps_chunk_size, router_coefficient(policy, args))
        self.starts_at_reference = starts_at(reference, policy)
        settle(args)
        self.prepared = Preparation(args, objective, tokenizer, reference)
        self.data_reports = self.prepared.reports
        super().__init__(
            step,
            model=policy,
            args=args,
            data_collator=data_collator or GroupCollator(tokenizer.pad_token_id),
            train_dataset=None if train_dataset is None else self.prepared(train_dataset, "train"),
            eval_dataset=None if eval_dataset is None else self.prepared.sets(eval_dataset),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.n_gpu > 1:
            raise FixableError(
                f"One process must see one GPU, got {args.n_gpu}: their batches cannot be split. Start one process "
                "per GPU with torchrun or accelerate, or set CUDA_VISIBLE_DEVICES=0."
            )
        self.sharded = require_shardable(self.accelerator, args, reference)
        self._others = weight_bytes(self.reference.model) if isinstance(self.reference, ModelReference) else 0
        if not self.sharded and (train_dataset is not None or args.max_tokens_per_forward != "auto"):
            self.data_collator.max_tokens = budget_for(policy, args, args.device, self._others)
        self.given = "ref_logps" in (getattr(self.train_dataset, "column_names", None) or [])  # instead of a reference
        if args.keep_layers not in (None, 0, "auto") and not self.kept.layers:
            raise ValueError(
                f"`keep_layers` must be 0 for {type(policy.get_base_model()).__name__}, whose layers are not told "
                f"apart, got {args.keep_layers}. Leave it out."
            )
        self._add_own_callbacks()
        self._signature_columns = [*GROUP_COLUMNS, *VALUE_COLUMNS]
        self.can_return_loss = True
        self.model.get_base_model().add_model_tags(self._tag_names)

    def _add_own_callbacks(self) -> None:
        args, handler = self.args, self.callback_handler
        handler.callbacks = [with_preferences(callback) for callback in handler.callbacks]
        self.add_callback(WatchPreferences(self.given or self.reference.kind != "none"))
        if args.sample_generations:
            every, tokens = args.sample_generations_every, args.sample_max_new_tokens
            self.add_callback(SampleGenerations(self, args.sample_generations, every, tokens))
        self.add_callback(self.kept)
        if isinstance(self.reference, AverageReference):
            self.sync = SyncReference(self.reference, args.ref_model_sync_steps)
            self.add_callback(self.sync)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """As `Trainer.add_callback`, but for those of TRL that cannot work here."""
        check_callbacks([callback])
        super().add_callback(callback)

    # ---- what is checked before the first number is used ---------------------------------------------------------

    def _prove(self) -> None:
        """Check models and vocabulary, choose the layout, and open the cache of the reference, once."""
        if self._proven:
            return
        if self.compute_metrics is not None:
            tell_what_metrics_get(self.args)
        groups, asked = self._sample(), self.args.batch_layout
        limits = self.args.max_length, self.args.device, self.data_collator.max_tokens
        with self.accelerator.autocast(), memory_said(*_AT_THE_START):
            other = self.reference.placed_on(self.args.device) if isinstance(self.reference, ModelReference) else None
            layout, self.layout_proof = prove_models(self.model, other, groups, asked, *limits)
        if self.args.padding_free and layout == "padded":
            raise NotImplementedError(
                f"`padding_free` must be False for {type(self.model.get_base_model()).__name__}, on which rows of "
                "several sequences do not hold, got True. Leave it out."
            )
        self.data_collator.layout = layout
        if self.args.precompute_ref_log_probs:
            args = self.args
            self.step.reference = cached_reference(self.reference, args.reference_cache, args.rounding)
        self._proven = True

    def _check_start(self) -> None:
        """Compare the policy with its reference before the first step, once, and say what is what."""
        if self._start_checked:
            return
        self._start_checked = True
        args, layout, rounds = self.args, self.data_collator.layout, isinstance(self.reference, CachedReference)
        expected = self.starts_at_reference and not self.given
        with self.accelerator.autocast(), memory_said(*_AT_THE_START):
            how = self.step.compared, self._sample(), layout, args.device, expected, rounds
            margin = check_start(self.model, *how, args.logps_chunk_size, self.data_collator.max_tokens)
        if args.process_index == 0:
            announce(self.model, GIVEN if self.given else self.reference.description, margin, args)

    def _sample(self) -> list[Group]:
        """A long and a short group of the data at hand."""
        return sample_groups(self.eval_dataset if self.train_dataset is None else self.train_dataset)

    def _precompute_reference(self) -> None:
        """Score all data under the reference, where it is kept on disk; what is there already is not scored again."""
        args, reference = self.args, self.reference
        assert isinstance(reference, CachedReference)
        sets = [one for one in (self.train_dataset, *as_named(self.eval_dataset).values()) if one is not None]
        size = args.precompute_ref_batch_size or args.per_device_eval_batch_size
        share = (args.process_index, args.world_size)
        with self.not_training(), self.compute_loss_context_manager():
            precompute(reference, self.model, sets, self.data_collator, size, args.device, share, args.disable_tqdm)
        self.accelerator.wait_for_everyone()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, after the checks on logits, layout and start.

        Args:
            resume_from_checkpoint: True for the last complete checkpoint in `output_dir`, or the path of one; None for
                what the configuration says.
            *args: As in `Trainer`.
            **kwargs: As in `Trainer`.

        Raises:
            ValueError: If there is no data, no such checkpoint, or it is of a run with another objective or data.
        """
        if self.train_dataset is None:
            raise ValueError("`train_dataset` must be given to train, got None. Pass it to the trainer.")
        asked = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = self._complete_checkpoint(asked)
        self._run = run_facts(self.args, self.train_dataset, self.model, self.sharded)
        if checkpoint is None and self.args.process_index == 0:
            self._begin_anew()
        if checkpoint is not None:
            check_same_run(checkpoint, read_record(checkpoint), self._record())
            if not isinstance(self.train_dataset, Dataset) and not self.args.ignore_data_skip:
                check_within_first_pass(checkpoint)
        if checkpoint is not None and (done := self._finished(checkpoint)):
            return done
        self._prove()
        self.model.train()
        if isinstance(self.reference, CachedReference):
            self._precompute_reference()
        self._check_start()
        longest = self._longest_batch()
        tokens = min(longest, self.data_collator.max_tokens or longest)
        count = kept_layers_for(self.model, self.args, self.args.device, tokens, self._others)
        self.kept.count = 0 if self.sharded and self.args.keep_layers == "auto" else count
        if self.args.device.type != "cpu":
            if self.args.recomputes:
                checkpoint_activations(self.model.get_base_model())  # as `Trainer` will, when training begins
                self.kept.begin()
            if not self.sharded:  # before the model is shared out there is less room than in training
                self._try_longest()
        self._unprepare()
        self.forget_log()
        self._loaded_step = None
        self._judged_at.clear()  # of other weights
        with replaced(self, "_remembered", self._memory()):
            return super().train(checkpoint, *args, **kwargs)

    def _begin_anew(self) -> None:
        """Say what another run left in the folder; its answers go, where none are sampled that write over them."""
        warn_of_others(self.args.output_dir)
        if not self.args.sample_generations:
            Path(self.args.output_dir, GENERATIONS_NAME).unlink(missing_ok=True)

    def _finished(self, checkpoint: str) -> TrainOutput | None:
        """What a run returns that has no step left: `Trainer` would make one more in the middle of an epoch."""
        state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
        if not 0 < self._steps(state) <= state.global_step:
            return None
        self._load_from_checkpoint(checkpoint)
        end = Path(self.args.output_dir, TRAINER_STATE_NAME)  # which has the line of the whole training, too
        if end.is_file() and (ended := TrainerState.load_from_json(str(end))).global_step == state.global_step:
            state = ended
        state.is_world_process_zero = self.is_world_process_zero()
        state.is_local_process_zero = self.is_local_process_zero()
        self.state = state
        self._judged_at[self._weights_step] = evaluations_of(checkpoint, self.args.output_dir)
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_best_model()
        metrics: dict[str, float] = next((line for line in reversed(state.log_history) if "train_runtime" in line), {})
        return TrainOutput(state.global_step, metrics.get("train_loss", 0.0), metrics)

    def _steps(self, state: TrainerState) -> int:
        """Steps of the whole training, which may end in the middle of an epoch."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        if self.args.auto_find_batch_size and state.train_batch_size:
            self._train_batch_size = state.train_batch_size  # as `Trainer` will
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def _memory(self) -> Remembered | None:
        """What the evaluations of a training remember of the reference; None of one that moves or that is on disk."""
        moves = isinstance(self.reference, AverageReference)
        if moves or self.sharded or not isinstance(self.reference, (LiveReference, ModelReference)):
            return None  # processes that share a model score together, or wait for each other
        return Remembered(spare_host_memory() // 2)

    def _complete_checkpoint(self, asked: str | bool | None) -> str | None:
        """The checkpoint to go on from, which the first process finds for all."""
        found: list[Any] = [None, None]
        if self.args.process_index == 0:
            try:
                found[0] = checkpoint_to_resume(asked, self.args.output_dir)
            except (OSError, ValueError) as error:
                found[1] = error
        broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        if found[0] is not None and self.args.process_index == 0:
            print(f"the training goes on from {found[0]}", file=sys.stderr)
        return found[0]

    def _longest(self) -> dict[str, Any] | None:
        """The micro-batch of the longest groups; None of a stream."""
        if not isinstance(self.train_dataset, Dataset):
            return None
        rows = longest_rows(self.train_dataset, self._train_batch_size)
        return self.data_collator([self.train_dataset[i] for i in rows])

    def _longest_batch(self) -> int:
        """Positions of its largest forward; of a stream, as many as its groups of two completions may have."""
        if (sample := self._longest()) is not None:
            return max(forwards_of([sample]))[0]
        return 2 * (self.args.max_length or 1024) * self._train_batch_size

    def _try_longest(self) -> None:
        """Forward and backward of the longest groups, so that trouble with memory comes in the first minute."""
        if (sample := self._longest()) is None:
            return
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        room = [torch.empty_like(parameter) for parameter in trained for _ in range(2)]  # for the optimizer's state
        with replaced(self._rescue, "give_up", lambda: None):  # nothing was trained that a checkpoint could keep
            self._begin([sample])
            self.training_step(self.model, sample, 1)
        self._restart()
        del room

    def _unprepare(self) -> None:
        """Let training wrap the model anew: an evaluation before it leaves it marked as prepared, without DDP."""
        if self.args.world_size > 1 and self.model_wrapped is self.model:
            self.model.__dict__.pop("_is_accelerate_prepared", None)
            self.accelerator._models.clear()

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
        if isinstance(eval_dataset, Mapping):
            found: dict[str, float] = {}
            for name, one in eval_dataset.items():
                found |= self.evaluate(one, ignore_keys, f"{metric_key_prefix}_{name}")
            return found
        if eval_dataset is None and self.eval_dataset is None:
            raise ValueError("`eval_dataset` must be given to evaluate, got None. Pass it here or to the trainer.")
        if isinstance(eval_dataset, str):
            require_named(self.eval_dataset, eval_dataset)
        if eval_dataset is None or isinstance(eval_dataset, str):
            self.prepared.again(eval_dataset, metric_key_prefix)
        else:
            eval_dataset = self.prepared(eval_dataset, result_name(metric_key_prefix))
        self._prove()
        if self.train_dataset is None:
            warn_of_itself(self.reference)
        with self.not_training():
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Trainer's loop, with metrics from the rows of the pair table instead of means of batch means."""
        self._records = PairRecords()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.last_pairs = records = self._records.gathered()
        self._records = None
        if judged := records.evaluation():
            self._judged_at[self._weights_step][result_name(metric_key_prefix)] = judged
        metrics = records.metrics() | {"num_tokens": self.state.num_input_tokens_seen}
        if self.step.objective.coupled:
            metrics["loss"] = self.step.of_sides(torch.from_numpy(records.sides())).mean().item()
            metrics["loss"] += self.step.router_aux_loss_coef * metrics.get("aux_loss", 0.0)
        rewards = records.column("reward_chosen"), records.column("reward_rejected")
        prediction = EvalPrediction(predictions=rewards, label_ids=records.rows())
        if self.compute_metrics is None:
            metrics |= preference_metrics(*rewards, records.column("label_prob"))
        else:
            metrics |= measured(self.compute_metrics, prediction)
        first = f"{metric_key_prefix}_"
        named = {key if key.startswith(first) else first + key: value for key, value in metrics.items()}
        return output._replace(
            predictions=prediction.predictions,
            label_ids=prediction.label_ids,
            metrics={**(output.metrics or {}), **denumpify_detensorize(named)},
            num_samples=len(records),
        )

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """As `Trainer.predict`: `predictions` are `(T,)` chosen and `(T,)` rejected rewards, `label_ids` the rows."""
        prepared = self.prepared(test_dataset, result_name(metric_key_prefix))
        self._prove()
        with self.not_training():
            return super().predict(prepared, ignore_keys, metric_key_prefix)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Score a batch without gradient and keep its pairs."""
        rescue = Rescue(self.data_collator, alone=self.args.world_size == 1)
        rescue.begin([inputs])
        found = rescue.run(lambda: [self._judged(model, piece) for piece in inputs["pieces"]])
        if self._records is not None:
            for (_, table), piece in zip(found, inputs["pieces"], strict=True):
                self._records.add(table, piece)
        return torch.stack([losses.sum() / max(len(losses), 1) for losses, _ in found]).mean(), None, None

    def _judged(self, model: nn.Module, piece: dict[str, Any]) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.step.losses(model, self._prepare_inputs(piece), self.args.eval_kl, self._remembered)


_AT_THE_START = (
    "on the first rows, which are scored before anything else",
    "Lower `max_length` or `max_tokens_per_forward`; `qlora-dpo plan` says what each option saves.",
)


def _set_up(policy: PeftModel, args: QLoRADPOConfig) -> None:
    """Have a policy's layers compute as the step needs them."""
    if args.use_liger_kernel:  # Trainer does it when a training begins, and an evaluation may come before
        use_liger(policy, args)
    keep_one_arithmetic(policy)
    prepare_policy(policy)
    if args.disable_dropout:
        disable_dropout(policy)
    if not args.recomputes:
        keep_activations(policy.get_base_model())  # `load_policy` turns checkpointing on
    elif args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        policy.enable_input_require_grads()  # the reentrant kind sees no gradient behind frozen embeddings
