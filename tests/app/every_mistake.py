"""About three hundred commands that cannot work, from a compact table, and the broken files that they name.

A line is a command and, after ``=>``, what its message must hold. ``{name}`` is a file of :func:`broken_files`.
"""

import gzip
import itertools
import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from pp_lightning.checkpoints import EMBEDDED_MODEL

_WORDS = " ".join(f"word{n}" for n in range(400))
_LONG = "x" * 5000
_NESTED = "[" * 20_000 + "]" * 20_000


def commands():
    """Every command with what its message must hold."""
    for line in filter(None, map(str.strip, _TABLE.strip().splitlines())):
        command, _, says = line.partition("=>")
        yield command.strip(), says.strip()
    for options, values, says in _PRODUCTS:
        for option, value in itertools.product(options.split(), values.split(" ")):
            first = "" if "_:_" in option else "test "
            value = {"EMPTY": "", "LONG": _LONG}.get(value, value)
            yield f"{first}{option.replace('_:_', ' ')}={value}", says.format(option=option.rpartition("_:_")[2])


_BROKEN_MODELS = [
    *("no_tokenizer", "pickle", "sizes", "activation", "rope", "index", "index_list", "index_file", "config_cut"),
    *("config_list", "config_deep", "config_surrogate", "type", "no_type", "weights_cut", "weights_empty"),
    *("weights_missing", "tokenizer_cut", "tokenizer_list", "remote", "heads", "layers", "zero_heads", "hidden_text"),
    *("negative", "latin", "folder_config", "vocabulary", "no_files"),
]
_PRODUCTS = [
    # whole numbers
    (
        "--data.window --data.batch_size --data.calibration_samples --data.limit_tokens --model.round_to "
        "--model.warmup_steps",
        "abc 1.5 EMPTY [] {{}} -3",
        "{option}|at least|not",
    ),
    ("--seed_everything", "abc -1 99999999999999999999 1.5", "seed"),
    ("--data.seed", "abc -1 99999999999999999999", "seed"),
    # fractions
    (
        "--model.pruning_ratio --model.attention_ratio --model.mlp_ratio",
        "abc nan inf -0.1 1.0 7 [] EMPTY",
        "ratio",
    ),
    ("--model.learning_rate --model.weight_decay", "abc nan [] -1", "{option}|learning_rate|weight_decay"),
    # one of several words
    ("--model.allocation --model.frozen_on --model.update --model.dtype --data.protocol", "nonsense 3 []", "{option}"),
    ("export_:_--format export_:_--layout export_:_--quantize export_:_--for", "nonsense 3", "format|layout|quant|for"),
    ("prune_:_--layout prune_:_--dtype", "nonsense 3", "layout|dtype"),
    ("--model.uniform --model.compile --model.allow_pickle --trainer.fast_dev_run", "maybe []", "{option}"),
    # lists
    ("--model.skip_layers", "abc [abc] [-1] [99] 1.5 {{}}", "skip_layers|layer"),
    ("compare_:_--ratios", "abc [] [0] [1.5] [nan] [-1] [0.2,0.2]", "ratio|compare"),
    ("compare_:_--methods", "[] magic [pp,magic] 7 [pp,pp] {{}}", "method|compare"),
    ("compare_:_--seeds", "[] abc [1,1] [-1] [1.5]", "seed"),
    ("compare_:_--study", "magic EMPTY", "study"),
    # methods
    ("--method --model.method", "magic ProbePrunning flapp 7 [] torch.nn.Linear nowhere.at.all EMPTY", "method"),
    ("compare_:_--methods", "flapp wanda", "did you mean|choose"),
    # devices and the trainer
    ("--trainer.accelerator", "tpuu hpu 7", "accelerator"),
    ("--trainer.devices", "0 -7 abc 2.5", "devices"),
    ("--trainer.precision --trainer.strategy", "nonsense", "precision|strategy"),
    ("benchmark_:_--device", "nonsense cuda:99 EMPTY 7", "device"),
    ("benchmark_:_--threads", "0 -1 abc", "threads"),
    ("benchmark_:_--repeats benchmark_:_--warmup benchmark_:_--batches", "0 abc", "repeats|warmup|batches"),
    ("benchmark_:_--cases", "[] abc [3]", "cases"),
    ("benchmark_:_--ratios benchmark_:_--dtypes benchmark_:_--variants", "[] [nonsense]", "ratio|dtype|variant"),
    ("benchmark_:_--model.shape benchmark_:_--method", "nonsense", "nonsense"),
    ("benchmark_:_--model.layers benchmark_:_--seed", "abc -1", "layers|seed"),
    # places
    ("--out", "EMPTY LONG {loop} {loop}/new {text}/below", "out"),
    (
        "--model.path --data.text --data.calibration --config",
        "{nowhere} LONG {loop} {folder} EMPTY",
        "path|file|folder|text|config|name|long|links",
    ),
    ("--model.statistics --model.importances", "LONG {loop} {folder} {text}", "statistics|importances"),
    ("--data.text.path --data.calibration.path", "{nowhere} {folder}", "file"),
    ("prune_:_--target", "params=2 params=0 flops=abc memory=1XB memory=1KB nonsense EMPTY params=0.0001", "target"),
    ("prune_:_--max_shard_size export_:_--max_shard_size", "abc -1GB 0 EMPTY", "shard"),
    # keys
    (
        "--model.colour --data.windows --trainer.max_step --nope --model.method.colour --data.text.colour "
        "compare_:_--method_s compare_:_--ratio prune_:_--targets",
        "7",
        "did you mean|is no option|no setting",
    ),
    # files
    ("--data.text", "{latin} {utf16} {binary} {empty}", "UTF-8|longer text"),
    (
        "--data.text --data.calibration",
        "{broken.jsonl} {deep.jsonl} {surrogate.jsonl} {fields.jsonl} {number.jsonl} {plain.jsonl.gz} {cut.jsonl.gz} "
        "{broken.parquet} {fields.parquet} {broken.arrow} {broken.jsonl.gz}",
        "line|read|text|column",
    ),
    (
        "--config",
        "{broken.yaml} {list.yaml} {key.yaml} {deep.yaml} {latin} {binary} {value.yaml} {anchor.yaml} {word.yaml}",
        "yaml|config|model|option|latin|binary|window",
    ),
    # checkpoints
    (
        "--model.path",
        " ".join(f"{{model-{name}}}" for name in _BROKEN_MODELS),
        "model-",
    ),
]

_TABLE = """
test --model.pruning_ratio 0.4 --model.method null => method
test --model.mlp_ratio 0.4 --model.method null => method
compare --model.pruning_ratio 0.4 --model.method null => ratios
compare --model.method pp => methods
test --model.floor 0.5 => global
test --model.floor 2 --model.allocation global => floor
test --model.floor nan --model.allocation global => floor
test --model.method FLAP --model.frozen_on history => frozen_on
test --model.method null --model.frozen_on history => method
test --model.uniform true --model.skip_layers [0] => uniform
test --model.uniform true --model.allocation global => uniform
test --model.method FLAP --model.refresh 4 => refresh
test --model.method FLAP --model.prefill dense => prefill
test --model.prefill nonsense => prefill
test --model.prefill -4 => prefill
test --model.refresh 0 => refresh
test --model.refresh abc => refresh
test --model.method.token_ratio 1.5 => token_ratio
test --model.method.token_ratio abc => token_ratio
test --model.method.rank_by nonsense => rank_by
test --model.method.momentum 3 => momentum
test --model.round_to 0 => round_to
test --model.pad_token nonsense-token => pad_token
test --model.recovered {nowhere} --model.method null => recover
test --model.recovered {folder} --model.method null => recover
test --model.recovered {folder} => method
test --model.from_scratch maybe => from_scratch
test --data.prefix 4 => prefix
test --data.protocol continuation --data.prefix 999 => prefix
test --data.protocol paper --data.batch_size 9999 => longer text
test --data.window 4096 => positions
test --data nonsense => data
test --data commonsense --data.path {nowhere} => {nowhere}
test --data commonsense --data.tasks [nonsense] => nonsense
test --data commonsense --data.tasks [] => tasks
test --data.calibration {short.jsonl} => longer documents
test --data.calibration C5 => C5
test --data.text Embeded => Embedded
test --data.text Embedded --data.text.part nonsense => part
test --data.calibration C4 --data.calibration.percent 0 => percent
test --method => method
test --data.window => window
test abc => abc
test --trainer.limit_test_batches 2.5 => limit_test_batches
test --trainer.max_steps abc => max_steps
test --trainer.num_nodes 0 => num_nodes
fit --model.warmup_steps -1 => warmup_steps
fit --model.method null => train
fit --model.method null --data.train [] => train
fit --model.method null --data.train [{nowhere}] => file
fit --model.method null --model.learning_rate 0 --data.train [{text}] => learning_rate
nonsense => nonsense
tset --data.window 32 => test
compare --methods pp --ratios 0.99 => leaves
compare --variants {{"a":7}} => variants
compare --methods flap_lora => max_steps
compare --methods pp --data.calibration {nowhere} => file
compare --methods pp --data.text {nowhere} => file
compare --methods pp --ratios 0.2 --seeds [0,1] --model.statistics {nowhere} => seeds
export --model.method null => method
export --format onnx --layout padded => layout
export --quantize q8_0 --model.method FLAP => gguf
export --model.method ProbePruning => frozen_on
export --check-with [nonsense] --model.method FLAP => check
export --check-with [] --for nonsense => for
prune --target params=0.6 --method pp => static
prune --target params=0.6 --data commonsense => text
prune --target params=0.6 --data.calibration {nowhere} => file
compare --study methods --data commonsense => text
benchmark --nope 1 => nope
benchmark --variant PP => variants
benchmark --config {nowhere} => file
benchmark --config {list.yaml} => list
benchmark --config {latin} => latin
benchmark --model.path {nowhere} --text {text} => folder
benchmark --model.path {embedded} --text {nowhere} => file
benchmark --model.path {embedded} --text {latin} => UTF-8
benchmark --model.path {embedded} --text {folder} => file
benchmark --model.path {embedded} => text
benchmark --model.path {model-pickle} --text {text} => safetensors
benchmark --mode nonsense => mode
benchmark --ratios [2] => ratio
benchmark --round_to 0 => round_to
benchmark --skip_layers [99] => layer
benchmark --out {text} => out
"""


def _changed_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def _break_models(folder):
    """A copy of the embedded model for every way in which a checkpoint can be broken."""

    def copy(name, remove=(), **changes):
        new = folder / f"model-{name}"
        shutil.copytree(EMBEDDED_MODEL, new, copy_function=os.link)
        for pattern in (*remove, *(["config.json"] if changes else [])):
            for file in new.glob(pattern):
                file.unlink()
        if changes:
            (new / "config.json").write_text((EMBEDDED_MODEL / "config.json").read_text())
            _changed_config(new, **changes)
        return new

    def write(folder, name, content):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    weights = EMBEDDED_MODEL / "model.safetensors"
    copy("no_tokenizer", ["token*", "special*", "vocab*", "merges*"])
    write(copy("pickle", ["*.safetensors"]), "pytorch_model.bin", b"\x80\x02}q\x00.")
    copy("sizes", intermediate_size=96)
    copy("activation", hidden_act="nonsense")
    copy("rope", rope_parameters={"rope_type": "nonsense", "rope_theta": 10000.0}, rope_scaling=None)
    index = "model.safetensors.index.json"
    write(copy("index", ["*.safetensors"]), index, "{}")
    write(copy("index_list", ["*.safetensors"]), index, "[]")
    write(copy("index_file", ["*.safetensors"]), index, '{"metadata": {}, "weight_map": {"a": "gone.safetensors"}}')
    write(copy("config_cut"), "config.json", '{"model_type": "lla')
    write(copy("config_list"), "config.json", "[1, 2]")
    write(copy("config_deep"), "config.json", '{"model_type": ' + _NESTED + "}")
    write(copy("config_surrogate"), "config.json", '{"model_type": "\\ud800"}')
    write(copy("latin"), "config.json", '{"model_type": "llam\xe4"}'.encode("latin-1"))
    copy("type", model_type="nonsense")
    copy("no_type", model_type=None, architectures=None)
    write(copy("weights_cut"), "model.safetensors", weights.read_bytes()[:5000])
    write(copy("weights_empty"), "model.safetensors", b"")
    tensors = load_file(weights)
    new = copy("weights_missing", ["*.safetensors"])
    save_file({name: t for name, t in tensors.items() if "layers.3." not in name}, new / "model.safetensors")
    write(copy("tokenizer_cut"), "tokenizer.json", '{"version": "1.0", "mod')
    write(copy("tokenizer_list"), "tokenizer.json", "[]")
    copy("remote", model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})
    copy("heads", num_attention_heads=7)
    copy("layers", num_hidden_layers=0)
    copy("zero_heads", num_attention_heads=0)
    copy("hidden_text", hidden_size="wide")
    copy("negative", hidden_size=-4)
    copy("vocabulary", vocab_size=5)
    copy("no_files", ["*.safetensors"])
    new = copy("folder_config", ["config.json"])
    (new / "config.json").mkdir()


def broken_files(folder: Path) -> dict[str, str]:
    """Write everything that the commands name; returns paths by name."""
    good = {"text.txt": "\n".join(f"line {n} of a text that is long enough to test on" for n in range(60))}
    good["documents.jsonl"] = "".join(json.dumps({"text": f"{n} {_WORDS}"}) + "\n" for n in range(4))
    texts = {
        **good,
        "latin": "caf\xe9 au lait".encode("latin-1") * 90,
        "utf16": "text".encode("utf-16") * 90,
        "binary": bytes(range(256)) * 9,
        "empty": "",
        "short": "a",
        "short.jsonl": '{"text": "short"}\n',
        "broken.jsonl": '{"text": "one"}\n{"text": "tw\n',
        "deep.jsonl": f'{{"text": {_NESTED}}}\n',
        "surrogate.jsonl": '{"text": "\\ud800 ' + _WORDS + '"}\n',
        "fields.jsonl": '{"words": "one"}\n',
        "number.jsonl": '{"text": 7}\n',
        "plain.jsonl.gz": "not compressed",
        "cut.jsonl.gz": gzip.compress((json.dumps({"text": _WORDS}) * 50).encode())[:60],
        "broken.jsonl.gz": gzip.compress(b"not json\n"),
        "broken.parquet": "PAR1 no",
        "broken.arrow": "ARROW no",
        "broken.yaml": "model: [1, 2\n  - x: :",
        "list.yaml": "- 1\n- 2\n",
        "key.yaml": "modell: {path: x}\n",
        "deep.yaml": "model: " + "[" * 5000 + "]" * 5000,
        "value.yaml": "data: {window: abc}\n",
        "anchor.yaml": "model: *nowhere\n",
        "word.yaml": "test\n",
    }
    folder.mkdir()
    for name, content in texts.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"words": ["one", "two"]}), folder / "fields.parquet")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    _break_models(folder)
    named = {path.name: str(path) for path in folder.iterdir()}
    return named | {
        "text": named["text.txt"],
        "documents": named["documents.jsonl"],
        "nowhere": str(folder / "nowhere.txt"),
        "embedded": str(EMBEDDED_MODEL),
    }
