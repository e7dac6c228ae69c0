"""What the commands do, and how they are called: for ``--help``."""

COMMANDS = {
    "test": "Evaluate one model: dense, or pruned with --model.method.",
    "compare": "Evaluate the dense model and several methods and ratios in one run: one table, one plot.",
    "prune": "One command: calibrate, choose, update what stays, evaluate before and after, write and check.",
    "export": "Write a pruned model as a checkpoint or a graph that unmodified tools load, and check that they do.",
    "lm-eval": "Any task of lm-evaluation-harness on a pruned model; its own options.",
    "benchmark": "Time dense and pruned models side by side: does saved arithmetic become saved time?",
    "plan": "What pruning a model will cost in memory, FLOPs and time; nothing is loaded; its own options.",
    "demo": "Six methods on the model that comes with the package, on two kinds of text; about a minute.",
    "fit": "Train on --data.train: a dense model, or with --model.recovery the adapters of a pruned one.",
}

EXAMPLES = """
examples:
  every method on the model that comes with the package, no network needed
    pp-lightning compare --config configs/models/tiny.yaml --config configs/methods/compare.yaml --out DIR
  your model, your text, calibrated on your json lines of {"text": ...}
    pp-lightning compare --model.path DIR --data.text my.txt --data.calibration mine.jsonl \\
        --methods pp,flap --ratios 0.2,0.4 --out DIR2
  a question about the method, answered by rows that differ in one thing: pp-lightning compare --help names all
    pp-lightning compare --config configs/models/tiny.yaml --study probe_size --ratios 0.4 --seeds 0,1,2 --out DIR
  one method with its own settings
    pp-lightning test --model.path DIR --method pp --model.method.token_ratio 0.25 --model.pruning_ratio 0.4 --out DIR2
  the seven commonsense tasks, from local files in their original formats
    pp-lightning compare --model.path DIR --data commonsense --data.path DIR3 --methods pp --out DIR2
  does saved arithmetic become saved time? its own options: pp-lightning benchmark --help
    pp-lightning benchmark --config configs/benchmark/cpu.yaml --out DIR
  what will it cost? nothing is loaded; its own options: pp-lightning plan --help
    pp-lightning plan --model.path DIR --model.pruning_ratio 0.4
  any task of lm-evaluation-harness, its own options
    pp-lightning lm-eval --tasks hellaswag --batch_size 20 --method pp --model_args path=DIR,pruning_ratio=0.4
  from a checkpoint and a text to a smaller checkpoint
    pp-lightning prune --model.path DIR --data.calibration FILE --target params=0.6 --out DIR2
  a static choice as a transformers folder, checked after writing
    pp-lightning export --model.path DIR --method wanda_sp --model.pruning_ratio 0.4 --out DIR2
  for an engine, and run in it: llama.cpp, vllm, openvino, onnxruntime-genai, transformers
    pp-lightning export --for llama.cpp --check-with llama.cpp --model.path DIR --method flap --out DIR2
  all settings as a file to edit
    pp-lightning test --print_config > my.yaml
"""
