"""An adapter merged into its base: a 16-bit model that anything loads, and what the merge does to log-probabilities."""

import copy
import json
import shutil
import tempfile
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from huggingface_hub.constants import REPOCARD_NAME
from peft import PeftConfig
from torch import Tensor
from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from qlora_dpo.cardtext import as_markdown, base_in_words, data_in_words, is_id, method, shown
from qlora_dpo.compare import MergeDifference, compared, scored_as_trained
from qlora_dpo.fold import BaseWeights, Fold, skeleton
from qlora_dpo.footprint import DTYPES
from qlora_dpo.model import adapters_below, load_tokenizer
from qlora_dpo.paths import TOKENIZER_FILES, check_path, local_adapter, saved_adapter, split_revision
from qlora_dpo.record import AdapterRecord, read_record
from qlora_dpo.shards import ShardWriter, open_checkpoint, size_in_bytes, weight_files
from qlora_dpo.weights import fit_vocabulary

INTO = ("quantized", "original")
MERGE_REPORT_NAME = "merge.json"
TAGS = ("dpo", "qlora-dpo", "preference-alignment")
UNFINISHED_NAME = "merge.unfinished"
"""Lies in a folder from the first byte that is written to the last."""
_CARRIED_FILES = (*TOKENIZER_FILES, "chat_template.json", "*processor_config.json")
"""Files that a model is served with besides its weights and config: of its tokenizer, and of what reads images."""


@dataclass(frozen=True)
class MergeReport:
    """What was merged, and what it changed.

    Attributes:
        output_dir: Folder of the merged model.
        into: `quantized` or `original`. A base that was not trained in 4 bit gives `original`.
        dtype: Dtype of the merged weights.
        base: Hub id or folder of the base.
        adapters: Folders or ids that were merged, lowest first.
        layers: Layers and whole modules that they change.
        total_bytes: Size of the weights.
        shards: Files they are in.
        untied: Whether embeddings and head, one matrix in the base, are two now.
        pairs: Pairs of the sample rows; 0 if there were none.
        accuracy: Preference accuracy of base and adapter on them, as trained; None without rows.
        margin: Mean reward margin of base and adapter; None without rows.
        differences: What each choice of `into` differs by; empty without rows.
    """

    output_dir: str
    into: str
    dtype: str
    base: str
    adapters: list[str]
    layers: int
    total_bytes: int
    shards: int
    untied: bool
    pairs: int = 0
    accuracy: float | None = None
    margin: float | None = None
    differences: dict[str, MergeDifference] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"merged into the {self.into} base: {self.layers} layers, {self.total_bytes / 1e9:.3f} GB in {self.shards} "
            f"file{'s' * (self.shards > 1)} ({self.dtype})"
        ]
        if self.untied:
            lines.append("embeddings and head are one matrix in the base and two here: the adapter changes them apart")
        if self.accuracy is None:
            return "\n".join([*lines, "no difference was measured: give a few preference rows with --dataset_name"])
        lines += [
            f"against base + adapter as trained, on {self.pairs} pairs, |difference| in nats:",
            f"  {'':20}{'per token':>18}{'per completion':>20}",
            f"  {'':20}{'mean':>9}{'max':>9}{'mean':>11}{'max':>9}{'accuracy':>10}{'margin':>9}",
            f"  {'base + adapter':20}{'':>38}{self.accuracy:10.3f}{self.margin:+9.4f}",
        ]
        for into, found in self.differences.items():
            title = f"into {into}{' (here)' * (into == self.into)}"
            lines.append(
                f"  {title:20}{found.token_mean:9.4f}{found.token_max:9.4f}{found.completion_mean:11.4f}"
                f"{found.completion_max:9.4f}{found.accuracy:10.3f}{found.margin:+9.4f}"
            )
        return "\n".join(lines)


def merge_adapter(
    adapter: str,
    output_dir: str,
    *,
    base: str | None = None,
    into: str = "quantized",
    dtype: str = "bfloat16",
    max_shard_size: str | int = "2GB",
    sample_rows: Dataset | Iterable[Mapping[str, Any]] | None = None,
    reference: str | None = None,
    trust_remote_code: bool = False,
) -> MergeReport:
    """Merge a saved adapter, and what it was trained on top of, into a model of its own.

    The base is read, merged and written tensor by tensor: what is in memory is the adapter in fp32 and a few copies of
    one layer in fp32 (where it changes experts, of all of a layer's). Measured on a CPU: 0.33 GB besides the libraries
    for a Llama of 542 million parameters, 1.08 GB in bf16, whose largest adapted layer has 46 MB in fp32. With
    `sample_rows` the model is then compared with 4-bit base and adapter, for both choices of `into`; that needs memory
    for the whole merged model, and disk space beside `output_dir` for a second one.

    Args:
        adapter: Folder or Hub id, perhaps as `id@revision`, of a saved adapter with its `qlora_dpo.json`.
        output_dir: Folder to write, new or empty; one that a merge left unfinished is begun again.
        base: The same of a model to take in place of the recorded base, for one that has moved.
        into: `quantized`: the base as it was trained on, quantised and dequantised. `original`: the base as it is
            stored, which the adapter never saw.
        dtype: `bfloat16`, `float16` or `float32`; sums are made in fp32 and rounded to it once. What transformers keeps
            in fp32 is written in fp32.
        max_shard_size: Largest file, such as `2GB`.
        sample_rows: Preference rows in any form that training accepts, to measure the difference on; a few are enough.
        reference: What the rewards on them are relative to, as in `load_scorer`; None for the recorded one.
        trust_remote_code: Whether to run Python code that the base ships, which then lies beside the merged model too.

    Returns:
        The report, which is also written to `merge.json`, and in words into the model's card, `README.md`.

    Raises:
        FileNotFoundError: If the adapter, its record or the base is not there.
        ValueError: If an argument is not understood, `output_dir` is taken, or the base is in 4 bit on disk.
        NotImplementedError: If the adapter cannot be merged.
    """
    _require_one_of("into", into, INTO)
    _require_one_of("dtype", dtype, DTYPES)
    if reference is not None and sample_rows is None:
        raise ValueError(
            f"`reference` must be None without `sample_rows`, whose rewards are relative to it, got {reference}. Leave "
            "it out, or give rows."
        )
    size = size_in_bytes(max_shard_size)
    _require_free(Path(output_dir))
    job = _job(adapter, base, into, dtype, trust_remote_code)
    if sample_rows is None:
        report = _written(job, Path(output_dir), size)
    else:
        rows = (
            sample_rows if isinstance(sample_rows, Dataset) else Dataset.from_list([dict(row) for row in sample_rows])
        )
        report = _measured(job, Path(output_dir), size, rows, reference)
    Path(output_dir, MERGE_REPORT_NAME).write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    _card(job, report).save(Path(output_dir, REPOCARD_NAME))
    return report


def _require_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {list(known)}, got {value!r}. Use {known[0]!r}.")


def _require_free(folder: Path) -> None:
    """Refuse a folder that holds something else than a merge that was cut off."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir` must be a folder, got the file {folder}. Name another.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / UNFINISHED_NAME).is_file():
        raise ValueError(f"`output_dir` must be new or empty, got {folder}, which is not. Name another or empty it.")


@dataclass(frozen=True)
class _Job:
    """What is merged into what.

    Attributes:
        adapter: The folder or id that was named.
        adapters: It and what lies below it, lowest first.
        base: Hub id or folder of the base.
        revision: Its revision.
        record: How the adapter was trained.
        into: `quantized` or `original`.
        dtype: Dtype of the merged weights, by name.
        config: The base's config, without quantisation.
        stored_in_4bit: Whether the base is in 4 bit on disk.
        trust_remote_code: Whether to run Python code that the base ships.
    """

    adapter: str
    adapters: list[str]
    base: str
    revision: str | None
    record: AdapterRecord
    into: str
    dtype: str
    config: PreTrainedConfig
    stored_in_4bit: bool
    trust_remote_code: bool

    @property
    def quantization(self) -> BitsAndBytesConfig | None:
        """The base's quantisation in training."""
        return BitsAndBytesConfig.from_dict(dict(self.record.quantization)) if self.record.quantization else None


def _job(adapter: str, base: str | None, into: str, dtype: str, trust_remote_code: bool) -> _Job:
    """Read what the folders say, and refuse what cannot be merged."""
    adapter = check_path(adapter, "adapter")
    record = read_record(adapter)
    top = saved_adapter(adapter)
    source, revision = split_revision(base or record.base, "base model")
    if base is None:
        revision = record.base_revision
    config = AutoConfig.from_pretrained(source, revision=revision or "main", trust_remote_code=trust_remote_code)
    stored = _without_quantization(config)
    method = stored and stored.get("quant_method", "bitsandbytes")
    if method not in (None, "bitsandbytes"):
        raise NotImplementedError(
            f"The base must be in 16 bit or in bitsandbytes' 4 bit on disk, got {method} in {source}. Name the 16-bit "
            "model with `base`."
        )
    if stored is not None and into == "original":
        raise ValueError(
            f"`base` must be a 16-bit model for into='original', got {source}, which is quantised on disk. Name the "
            "model it was made from."
        )
    if record.quantization is None:
        into = "original"  # which is what was trained on
    job = _Job(
        adapter=adapter,
        adapters=[*adapters_below(top), top],
        base=source,
        revision=revision,
        record=record,
        into=into,
        dtype=dtype,
        config=config,
        stored_in_4bit=stored is not None,
        trust_remote_code=trust_remote_code,
    )
    for one in job.adapters:
        PeftConfig.from_pretrained(local_adapter(one))  # which says so if it is not there
    return job


def _without_quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Take the quantisation out of a config; returns it as a dict if there was one."""
    found = None
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            found = part.quantization_config
            del part.quantization_config
    return found if found is None or isinstance(found, dict) else found.to_dict()


# ---- writing ---------------------------------------------------------------------------------------------------------


def _written(job: _Job, folder: Path, max_bytes: int) -> MergeReport:
    """Write the merged model."""
    checkpoint = open_checkpoint(job.base, job.revision)
    trained = job.into == "quantized"
    options = {"quantization": job.quantization, "dtype": getattr(torch, job.record.dtype)} if trained else {}
    models = [skeleton(job.config, job.trust_remote_code) for _ in range(2)]  # each is changed on its own
    fitted = [fit_vocabulary(model, adapter) for model in models for adapter in job.adapters]
    base = BaseWeights(checkpoint, models[0], replaced=next(filter(None, fitted), {}), **options)
    fold = Fold(base, models[1], job.adapters)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED_NAME).write_text(f"{job.adapter} into {job.base} ({job.into}, {job.dtype})\n")
    for left in weight_files(folder):
        left.unlink()
    names = [*checkpoint.names(), *base.shapes]  # some of the model's own, if tied weights part
    writer = ShardWriter(folder, max_bytes, names)
    untied = _write_weights(fold, writer, getattr(torch, job.dtype))
    shards = writer.close()
    _write_config(job, folder, untied, base)
    _write_generation_config(job, folder, _write_tokenizer(job, folder))
    (folder / UNFINISHED_NAME).unlink()
    return MergeReport(
        output_dir=str(folder),
        into=job.into,
        dtype=job.dtype,
        base=job.base,
        adapters=job.adapters,
        layers=fold.layers,
        total_bytes=writer.total_bytes,
        shards=shards,
        untied=untied,
    )


def _write_weights(fold: Fold, writer: ShardWriter, dtype: torch.dtype) -> bool:
    """Every tensor of the base's files, merged where an adapter changes it; says whether tied weights have parted."""
    base, untied = fold.base, False
    parameters = {key: name for name, key in base.names.items()}
    for key in base.checkpoint.names():
        name = parameters.get(key)
        if name is None:  # a part of what the model puts together while it loads
            writer.add(key, _rounded(fold.part(key), base.loaded_dtype(key, dtype), key))
            continue
        value = _rounded(fold.value(name), base.loaded_dtype(name, dtype), key)
        writer.add(key, value)
        for other in base.tied.get(name, ()):
            if fold.changes(name) or fold.changes(other):
                twin = _rounded(fold.value(other), base.loaded_dtype(other, dtype), other)
                if not torch.equal(value, twin):
                    untied = True
                    if other not in base.names:
                        writer.add(other, twin)
        del value
    return untied


def _rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor in its dtype of the merged model, if it is one of floating-point numbers.

    Raises:
        ValueError: If a number is too large for it.
    """
    if not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(dtype)
    if not all(torch.isfinite(end) for end in torch.aminmax(rounded)):  # without a copy
        raise ValueError(f"`dtype` must hold every weight, got {dtype}, which {name} does not fit. Use 'bfloat16'.")
    return rounded


def _write_config(job: _Job, folder: Path, untied: bool, base: BaseWeights) -> None:
    """The config, without quantisation, and the code that it names, if the base has some."""
    config = copy.deepcopy(job.config)
    if base.replaced:  # embeddings with rows for added tokens
        config.get_text_config().vocab_size = base.model.config.get_text_config().vocab_size
    for part in (config, config.get_text_config()):
        part.dtype = getattr(torch, job.dtype)
        if untied:
            part.tie_word_embeddings = False
    if base.model._auto_class is not None:
        custom_object_save(base.model, folder, config=config)
    config.save_pretrained(folder)


def _write_generation_config(job: _Job, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """The base's, if it has one; answers end at the adapter's token too, where it has another tokenizer."""
    try:
        config = GenerationConfig.from_pretrained(job.base, revision=job.revision or "main")
    except OSError:
        if tokenizer is None:
            return
        config = GenerationConfig.from_model_config(job.config)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        ends = [tokenizer.eos_token_id, *(end for end in ends if end not in (None, tokenizer.eos_token_id))]
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
    config.save_pretrained(folder)


def _write_tokenizer(job: _Job, folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer's files as they are: the base's, or the adapter's if it is another one, which is returned.

    Files of the base are the ones that other programs have been tried with; saving them again would change them.
    """
    files, own = _carried_files(job.base, job.revision), _carried_files(local_adapter(job.adapter))
    tokenizer = _own_tokenizer(job, files, own)
    if tokenizer is not None:
        unsaved = (".model", "processor_config.json")  # which saving a tokenizer leaves out
        files = {name: path for name, path in files.items() if name.endswith(unsaved)} | own
    for name, path in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
    return tokenizer


def _carried_files(source: str, revision: str | None = None) -> dict[str, Path]:
    """The files beside the weights, of a folder or a Hub id, by their place there."""
    wanted = list(_CARRIED_FILES)
    where = source if Path(source).is_dir() else snapshot_download(source, revision=revision, allow_patterns=wanted)
    return {path.relative_to(where).as_posix(): path for pattern in wanted for path in Path(where).glob(pattern)}


def _own_tokenizer(job: _Job, base_files: Container[str], own_files: Iterable[str]) -> PreTrainedTokenizerBase | None:
    """The adapter's tokenizer, if it knows other tokens or templates than the base's, or other ones are special."""
    if not any(name.startswith("tokenizer") for name in own_files):
        return None
    trust = {"trust_remote_code": job.trust_remote_code}
    own = load_tokenizer(job.adapter, **trust)
    if "tokenizer_config.json" not in base_files:
        return own
    base = load_tokenizer(job.base, revision=job.revision or "main", **trust)
    same = ("chat_template", "special_tokens_map")
    differs = own.get_vocab() != base.get_vocab() or any(getattr(own, one) != getattr(base, one) for one in same)
    return own if differs else None


# ---- the card --------------------------------------------------------------------------------------------------------


def _card(job: _Job, report: MergeReport) -> ModelCard:
    """The card of a merged model: what it is made of, how to load it, and what the merge changed."""
    record, name = job.record, Path(report.output_dir).resolve().name
    base = base_in_words(record) if job.base == record.base else as_markdown(shown(job.base))
    merged = ", then ".join(as_markdown(shown(one)) for one in job.adapters)
    stored = {"quantized": "as it was quantised in training, dequantised", "original": "as it is stored"}[job.into]
    trust = ", trust_remote_code=True" if job.trust_remote_code else ""
    licence = record.licence.get("license_name") or record.licence.get("license")
    sections = {
        "": f"{base} with the adapter {merged} merged into it: one model, in {job.dtype}. The base was taken {stored}. "
        f"The adapter was {method(record)}",
        "How to load it": f"""\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name!r}, dtype="auto"{trust})
tokenizer = AutoTokenizer.from_pretrained({name!r}{trust})
```""",
        "What the merge changed": _differences(report),
        "Data of the adapter": data_in_words(record),
        "Limits": "The model has the limits and the biases of its base and of those who wrote the preferences; neither "
        "safety nor abilities outside that data were measured.",
        "Licence": licence and f"That of the base model: {as_markdown(licence)}.",
    }
    body = "\n\n".join(f"## {head}\n\n{text}" if head else text for head, text in sections.items() if text)
    ids = list(dict.fromkeys(origin["id"] for origin in record.datasets.values() if "id" in origin))
    known = {"base_model": job.base, "base_model_relation": "finetune"} if is_id(job.base) else {}
    head = ModelCardData(
        **known,
        **({"datasets": ids} if ids else {}),
        **record.licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*TAGS, *(record.loss.get("loss_type") or [])])),
    )
    return ModelCard(f"---\n{head.to_yaml()}\n---\n# {as_markdown(name)}\n\n{body}\n")


def _differences(report: MergeReport) -> str:
    """What was measured, as a table."""
    if report.accuracy is None:
        return "The difference to base and adapter as trained was not measured."
    rows = [
        ["", "mean, per token", "max", "mean, per completion", "max", "accuracy", "margin"],
        ["---"] * 7,
        ["base and adapter as trained", "", "", "", "", f"{report.accuracy:.3f}", f"{report.margin:+.4f}"],
    ]
    for into, found in report.differences.items():
        name = f"merged into the {into} base" + ", this model" * (into == report.into)
        numbers = (found.token_mean, found.token_max, found.completion_mean, found.completion_max)
        rows.append([name, *(f"{number:.4f}" for number in numbers), f"{found.accuracy:.3f}", f"{found.margin:+.4f}"])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"Absolute differences of log-probabilities in nats, on {report.pairs} pairs:\n\n{table}"


# ---- measuring -------------------------------------------------------------------------------------------------------


def _measured(job: _Job, folder: Path, max_bytes: int, rows: Dataset, reference: str | None) -> MergeReport:
    """Write the merged model, and compare it and the other choice with base and adapter."""
    trust = {"trust_remote_code": job.trust_remote_code}
    options = {"base": job.base, "revision": job.revision or "main"} | trust
    sample, before = scored_as_trained(job.adapter, rows, reference, **options)
    report = _written(job, folder, max_bytes)
    found = {job.into: compared(sample, folder, job.dtype, before, **trust)}
    other = next(into for into in INTO if into != job.into)
    if job.record.quantization is not None and not (other == "original" and job.stored_in_4bit):
        with tempfile.TemporaryDirectory(dir=folder.resolve().parent, prefix=".merge-") as beside:
            _written(replace(job, into=other), Path(beside), max_bytes)
            found[other] = compared(sample, Path(beside), job.dtype, before, **trust)
    return replace(
        report,
        pairs=len(before.margins),
        accuracy=before.accuracy,
        margin=before.margin,
        differences={into: found[into] for into in INTO if into in found},
    )
