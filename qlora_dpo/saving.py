"""The saving half of the trainer: adapters, whole checkpoints, and what goes to the Hub."""

import warnings
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.constants import REPOCARD_NAME
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils.hub import PushInProgress

from qlora_dpo.adapters import trained_adapters
from qlora_dpo.arguments import Preparation
from qlora_dpo.card import save_card, write_card
from qlora_dpo.checkpoints import checkpoint_folder, load_step_state, rotate, save_step_state, unmark, write_manifest
from qlora_dpo.hub import make_repository, places, upload, upload_later
from qlora_dpo.model import load_trained
from qlora_dpo.record import AdapterRecord, read_record, record_of, write_record
from qlora_dpo.reference import Reference
from qlora_dpo.sampling import replaced
from qlora_dpo.training import StepTrainer


class SavingTrainer(StepTrainer):
    """A trainer that saves adapters with their record and card, and checkpoints that are whole or not there."""

    prepared: Preparation
    given: bool
    _judged_at: defaultdict[int, dict[str, Any]]
    """Evaluations by step and set."""
    _loaded_step: int | None = None
    """The step of the weights, where it is not the last."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._run: dict[str, Any] = {}
        self._judged_at = defaultdict(dict)
        super().__init__(*args, **kwargs)

    @property
    def reference(self) -> Reference:
        """What the policy is compared with."""
        return self.step.reference

    # ---- saving --------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save adapter, tokenizer, `qlora_dpo.json`, card and log; never the arguments, which may hold a Hub token."""
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        Path(folder, REPOCARD_NAME).unlink(missing_ok=True)  # PEFT would read it, and fail if it cannot
        self.model.save_pretrained(folder, state_dict=state_dict, selected_adapters=trained_adapters(self.model))
        self.processing_class.save_pretrained(folder)
        write_record(folder, self.model, self._record())
        draw = not Path(folder).name.startswith(PREFIX_CHECKPOINT_DIR)
        if draw and self.state.log_history:  # into a checkpoint `Trainer` writes it
            self.state.save_to_json(str(Path(folder, TRAINER_STATE_NAME)))
        save_card(folder, self.hub_model_id, self.state.log_history, draw)  # instead of PEFT's draft

    @property
    def _weights_step(self) -> int:
        """The step that the weights are of: the last, or that of the best checkpoint once it is loaded."""
        return self.state.global_step if self._loaded_step is None else self._loaded_step

    def _record(self) -> AdapterRecord:
        """What lies beside the adapter; `beta` as it is now, beside the options of the loss as the run began."""
        record = record_of(
            self.model,
            self.args,
            self.reference,
            self.given,
            self.step.bco_delta.mean,
            datasets=self.prepared.origins,
            evaluations=self._judged_at[self._weights_step],
            run=self._run,
        )
        return replace(record, beta=self.beta)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As `Trainer`'s, with the state of the step, and marked as whole before it is pushed or others are deleted."""
        with self.as_before_the_step():
            self._save_whole(model, trial)

    def _save_whole(self, model: nn.Module, trial: Any) -> None:
        args, run = self.args, self._get_output_dir(trial=trial)
        folder = checkpoint_folder(run, self.state.global_step)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):  # which the checkpoint that the run went on from may not know
                self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        if args.should_save:
            unmark(folder)  # one that is written again
        with replaced(args, "save_total_limit", None), replaced(args, "push_to_hub", False):
            super()._save_checkpoint(model, trial)
        self.save_log_state(folder)
        self.accelerator.wait_for_everyone()  # each has written the state of its random numbers
        if args.should_save:
            save_step_state(self.step, folder)
            write_manifest(folder, args.save_only_model)
        if args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if args.should_save:
            rotate(run, args.save_total_limit, kept=(folder, self.state.best_model_checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The trained adapter, the step's state and the log's; frozen adapters and what is trainable stay as is."""
        load_trained(self.model, resume_from_checkpoint)
        load_step_state(self.step, Path(resume_from_checkpoint))
        self.beta = read_record(resume_from_checkpoint).beta  # a callback may have changed it
        self.load_log_state(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As `Trainer`'s; in a run of another length, the learning rate is that of its own schedule from here on."""
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = self.lr_scheduler
        if checkpoint is None or not isinstance(scheduler, LambdaLR):
            return
        rates = [
            base * at(scheduler.last_epoch) for base, at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        if rates != scheduler.get_last_lr():
            before, now = scheduler.get_last_lr()[0], rates[0]
            warnings.warn(
                f"The schedule of the learning rate is for another number of steps (`max_steps`, `num_train_epochs`) "
                f"than before the stop: it goes on with {now:.3g} instead of {before:.3g}. Set them back to "
                "keep the old one.",
                stacklevel=2,
            )
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates

    def _load_best_model(self) -> None:
        """The trained adapter of the best checkpoint, and the step's state there."""
        best = str(self.state.best_model_checkpoint)
        self._loaded_step = self.state.best_global_step
        record = read_record(best)
        self._judged_at[self._loaded_step] = record.evaluations  # also by a run that was stopped since
        self.beta = record.beta
        load_trained(self.model, best)
        load_step_state(self.step, Path(best))

    # ---- the Hub -------------------------------------------------------------------------------------------------

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        *,
        language: str | None = None,
        license: str | None = None,
        **others: Any,
    ) -> None:
        """Write the card into `output_dir`; base, data and results are those of the run.

        Args:
            model_name: The card's title.
            dataset_name: Hub id or path of the training data, where the run does not know it; the adapter's
                `qlora_dpo.json` keeps it.
            tags: More tags.
            language: Of the data.
            license: In place of the base's.
            **others: What `Trainer` takes besides must be None.

        Raises:
            TypeError: For what `Trainer` lets one name and the run knows.
            ValueError: For a name of training data that there is not.
        """
        if given := [name for name, value in others.items() if value is not None]:
            name = given[0]
            raise TypeError(
                f"`{name}` must be None, got {others[name]!r}: the card takes it from the run. Leave it out."
            )
        self._name_data(dataset_name)
        if self.is_world_process_zero():
            folder = self.args.output_dir
            if dataset_name is not None:
                record = read_record(folder)
                named = record.datasets | {"train": self.prepared.origins["train"]}
                write_record(folder, self.model, replace(record, datasets=named))
            asked: dict[str, Any] = {"language": language, "license": license, "tags": tags, "model_name": model_name}
            write_card(self.args.output_dir, self.hub_model_id, self.state.log_history, **asked)

    def _name_data(self, dataset_name: str | None) -> None:
        """Let records and cards from here on name the training data, if a name is given."""
        if dataset_name is None:
            return
        if "train" not in self.prepared.origins:
            raise ValueError(
                f"`dataset_name` must be None for a trainer without training data, got {dataset_name}. Leave it out."
            )
        self.prepared.name("train", dataset_name)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository that `hub_model_id` names, or one named like `output_dir`."""
        if not self.is_world_process_zero():
            return
        args = self.args
        name, token = args.hub_model_id or Path(args.output_dir).absolute().name, token or args.hub_token
        private = args.hub_private_repo if private is None else private
        self.hub_model_id = make_repository(name, private=private, token=token, folder=args.output_dir)
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the adapter into `output_dir` and push it: nothing but its own files, as `push_adapter` does.

        Args:
            commit_message: First line of the commit.
            blocking: Whether to wait for the upload.
            token: A token that may write; None for `hub_token`, HF_TOKEN or the login.
            revision: Branch to commit to; None for `hub_revision`.
            private: Whether a new repository is private; None for `hub_private_repo`.
            **kwargs: For `create_model_card`: `model_name`, `dataset_name`, `tags`, `language`, `license`.

        Returns:
            The commit, or a future of it; None on processes that push nothing.
        """
        self._name_data(kwargs.get("dataset_name"))
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        args = self.args
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        private = args.hub_private_repo if private is None else private
        push = upload if blocking else upload_later
        token, revision = token or args.hub_token, revision or args.hub_revision
        return push(args.output_dir, self.hub_model_id, private, token, revision, commit_message)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint's adapter in the background, where `hub_strategy` says; none of its training state."""
        args, strategy = self.args, HubStrategy(self.args.hub_strategy)
        if not self.is_world_process_zero() or strategy is HubStrategy.END:
            return
        running: PushInProgress | None = self.push_in_progress
        busy = running is not None and not running.is_done()
        if busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        options = (self.hub_model_id, args.hub_private_repo, args.hub_token, args.hub_revision, message)
        jobs = [upload_later(checkpoint_folder, *options, place) for place in places(strategy, checkpoint_folder)]
        self.push_in_progress = PushInProgress([*(running.jobs if running is not None and busy else []), *jobs])
