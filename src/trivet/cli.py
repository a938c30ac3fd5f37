"""The command line: verbs only. Everything heavy is imported by the verb that needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trivet.config import UserError, validate

if TYPE_CHECKING:
    import torch


RANK = int(os.environ.get("RANK", "0"))  # which of the processes that torchrun started

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Design, train, serve and let act a small model that thinks.\n\n"
    "trivet run configs/demo.toml --out runs/demo    the whole road, in ten minutes on a laptop\n\n"
    "trivet chat runs/demo/tool                      talk to what it trained",
)

ConfigFile = Annotated[Path, typer.Argument(help="A TOML file, see configs/.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, e.g. train.steps=100.", show_default=False),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Directory to write. The same command again resumes.")]
ModelDir = Annotated[Path, typer.Argument(help="A model directory, e.g. runs/demo/tool.", show_default=False)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...; auto: the GPU if there is one.")]
Budget = Annotated[
    int | None, typer.Option("--budget", "-b", min=0, help="At most this many thinking tokens. Default: unlimited.")
]
NoThink = Annotated[bool, typer.Option("--no-think", help="Answer at once, with the thinking block closed.")]
RopeYarn = Annotated[
    float | None, typer.Option("--rope-yarn", help="Stretch the context by this factor with YaRN, e.g. 4. Untrained.")
]
DualChunk = Annotated[
    float | None, typer.Option("--dual-chunk", help="Stretch the context by this factor with dual chunk attention.")
]
Cache = Annotated[
    str,
    typer.Option(
        "--cache",
        help="What layers keep of each token: full, int8, window:252+4, layers:512-128+4, snapkv:512/32, "
        "lowrank:1024/64.",
    ),
]

Weights = Annotated[
    Literal["int8", "int4"] | None,
    typer.Option("--weights", help="Keep matrices in 8 or 4 bits (int4 computes in bf16)."),
]

# A step of training, to `trivet plan`. What is not given is what the TOML's [train] says.
Rows = Annotated[int | None, typer.Option(min=1, help="Rows of a device's microbatch. Default: the TOML's, or 1.")]
Length = Annotated[int | None, typer.Option(min=1, help="Tokens of a row. Default: the TOML's, or --context.")]
Precision = Annotated[
    Literal["fp32", "bf16"] | None, typer.Option(help="Of products in training. Default: the TOML's, or bf16.")
]
Recompute = Annotated[
    bool | None,
    typer.Option("--recompute/--no-recompute", help="Activation checkpointing. Default: the TOML's, or not."),
]
Offload = Annotated[
    Literal["none", "optimizer", "gradients"] | None,
    typer.Option(help="What is kept in host memory. Default: the TOML's, or none."),
]
Shards = Annotated[
    int | None, typer.Option(min=1, help="Devices that share weights, gradients and optimizer (FSDP). Default: 1.")
]
ExpertShards = Annotated[
    int | None, typer.Option(min=1, help="Divides experts further (EP): on shards x expert shards devices. Default: 1.")
]


@app.command()
def run(config: ConfigFile, overrides: Overrides = None, out: Out = Path("runs/run"), device: Device = "auto") -> None:
    """Run a recipe: a list of stages. Complete stages are skipped, a stopped one resumes."""
    from trivet.config import load
    from trivet.recipes.progress import Live
    from trivet.recipes.stages import Recipe, run_recipe
    from trivet.train.parallel import first, processes

    recipe = load(config, Recipe, overrides or [])
    wanted = _device(device, recipe.threads, together=True)
    with _interruptible(), processes(wanted) as on, Live() as live:
        if first():
            run_recipe(recipe, out, on, live.watch, live.say)
        else:
            run_recipe(recipe, out, on, lambda name, stage: None, lambda text: None)


@app.command()
def train(
    config: ConfigFile, overrides: Overrides = None, out: Out = Path("runs/train"), device: Device = "auto"
) -> None:
    """Pretrain or fine-tune: on tasks, on your own JSONL, or on plain text."""
    from trivet.recipes.kinds.train import TrainStage

    _one_stage(config, TrainStage, overrides, out, device, together=True)


@app.command()
def rl(config: ConfigFile, overrides: Overrides = None, out: Out = Path("runs/rl"), device: Device = "auto") -> None:
    """Reinforcement learning with verifiable rewards, from a trained model."""
    from trivet.recipes.kinds.rl import RLStage

    _one_stage(config, RLStage, overrides, out, device, together=True)


@app.command()
def rollouts(
    run: Annotated[Path, typer.Argument(help="A directory that RL wrote with rl.page_every.", show_default=False)],
    last: Annotated[int, typer.Option("--last", min=1, help="Recorded steps to show, counted from the end.")] = 5,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Page to write. Default: rollouts.html in RUN.")
    ] = None,
) -> None:
    """Episodes of RL as one page to read: tokens coloured by advantage, ratio, entropy or logprob."""
    from trivet.rl.page import write_page

    print(write_page(run, last, out))


@app.command("eval")
def evaluate(
    model: ModelDir,
    task: Annotated[
        str, typer.Option("--task", "-t", help="Task name: chain, search, arithmetic, jsonl, gym:NAME, verifiers:NAME.")
    ],
    settings: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="A setting of the task, e.g. --set max_steps=12.")
    ] = None,
    budgets: Annotated[
        str, typer.Option("--budgets", help="Thinking budgets to sweep, e.g. 0,8,32,none (none: unlimited).")
    ] = "none",
    no_think: NoThink = False,
    no_tools: Annotated[bool, typer.Option("--no-tools", help="Take the task's tools away.")] = False,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Problems a point.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", "-T", min=0.0, help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Tokens an answer may take, thinking included.")
    ] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    rope_yarn: RopeYarn = None,
    dual_chunk: DualChunk = None,
    weights: Weights = None,
    cache: Annotated[
        str, typer.Option("--cache", help="Cache policies to sweep, as for chat, e.g. full,int8,window:60+4.")
    ] = "full",
    device: Device = "auto",
) -> None:
    """Accuracy on held-out problems with 95% intervals, for one or more thinking budgets."""
    from trivet.messages import Sampling
    from trivet.recipes.loading import Loading
    from trivet.recipes.verbs import evaluate_directory

    evaluate_directory(
        model, task, settings or [], _budgets(budgets, no_think), not no_tools, count,
        Sampling(temperature=temperature, max_tokens=max_tokens), seed, as_json,
        Loading(_device(device), rope_yarn, dual_chunk, weights),
        cache,
    )  # fmt: skip


@app.command()
def chat(
    model: ModelDir,
    budget: Budget = None,
    no_think: NoThink = False,
    min_thinking: Annotated[
        int, typer.Option("--min-thinking", min=0, help="A thought that would end before so many tokens goes on.")
    ] = 0,
    tools: Annotated[
        str, typer.Option("--tools", help="Tools the model may call, comma separated, e.g. calculator. Off by default.")
    ] = "",
    temperature: Annotated[float, typer.Option("--temperature", "-T", min=0.0, help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Tokens an answer may take, thinking included.")
    ] = 400,
    fold: Annotated[
        bool, typer.Option("--fold/--unfold", help="Fold long thoughts to their last line when they are done.")
    ] = True,
    guess: Annotated[
        str,
        typer.Option(
            "--guess", help="Guess tokens ahead, same text sooner: ngram:4, mtp:2, or DIRECTORY:4 (a draft model)."
        ),
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    rope_yarn: RopeYarn = None,
    dual_chunk: DualChunk = None,
    weights: Weights = None,
    cache: Cache = "full",
    device: Device = "auto",
) -> None:
    """Talk to a model in the terminal: thoughts dimmed, tool calls shown, tokens counted."""
    from trivet.messages import Sampling
    from trivet.recipes.loading import Loading
    from trivet.recipes.terminal import converse

    sampling = Sampling(
        temperature=temperature, max_tokens=max_tokens, thinking="off" if no_think else budget,
        min_thinking=min_thinking, seed=seed,
    )  # fmt: skip
    names = [name for name in tools.split(",") if name]
    converse(model, sampling, names, fold, guess, Loading(_device(device), rope_yarn, dual_chunk, weights), cache)


@app.command()
def export(
    model: ModelDir,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write; it must not exist.")],
    like: Annotated[
        Path | None,
        typer.Option("--like", help="The checkpoint it came from: its config and tokenizer files. Adapters know."),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option("--family", help="For a model of your own: qwen3, deepseek_v3 ...; default: what fits."),
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write only the adapter, in PEFT's format; else it is merged.")
    ] = False,
    dtype: Annotated[
        Literal["fp32", "bf16"] | None, typer.Option("--dtype", help="Type of the weights; default: as they are.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Of a checkpoint, these layers only: 4 (the first), 0:4, 0,7,60.")
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option("--experts", help="Of every sparse layer, these experts only: 8 (the first), 0:8, 3,5."),
    ] = None,
) -> None:
    """Write a model in its family's own format, which transformers, vLLM and others load; an adapter in PEFT's."""
    from trivet.recipes.export import export as write
    from trivet.recipes.export import export_adapter

    if adapter:
        given = {"--family": family, "--layers": layers, "--experts": experts}
        export_adapter(model, out, like, dtype, [name for name, value in given.items() if value is not None])
    else:
        write(model, out, like, family, dtype, layers, experts)


@app.command()
def plan(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Known names (qwen3-8b, deepseek-v3 ...), model directories, config.json files, or TOML files "
            "with a [model].",
            show_default=False,
        ),
    ] = None,
    context: Annotated[int, typer.Option("--context", "-c", min=1, help="Context length to price.")] = 4096,
    generate: Annotated[int, typer.Option("--generate", min=1, help="Length of the generation to price.")] = 65_536,
    hardware: Annotated[str, typer.Option("--hardware", help="Devices, e.g. h100,h200,cpu: what fits, limits.")] = "",
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Sequences in a step; default: what fits.")
    ] = None,
    rows: Rows = None,
    length: Length = None,
    precision: Precision = None,
    recompute: Recompute = None,
    offload: Offload = None,
    shards: Shards = None,
    expert_shards: ExpertShards = None,
    tokens: Annotated[float | None, typer.Option("--tokens", help="Tokens to train on, e.g. 15e12.")] = None,
    mfu: Annotated[
        float, typer.Option("--mfu", min=0.01, max=1.0, help="Share of the peak that training reaches.")
    ] = 0.4,
    price: Annotated[float | None, typer.Option("--price", help="Price of a device an hour, in any currency.")] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Run a training step, prefill and decoding here: predicted against measured."),
    ] = False,
    device: Device = "auto",
    plot: Annotated[Path | None, typer.Option("--plot", help="Write plots to this file (.png, .svg, .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    list_known: Annotated[bool, typer.Option("--list", help="List the known models.")] = False,
) -> None:
    """Price models on paper, side by side: parameters, cache, FLOPs, training memory, limits of hardware, cost.

    Reads no weights and, but for --measure, needs no torch.
    """
    from trivet.measure.plan import Question
    from trivet.measure.plan_show import list_models, measure_models, plan_models

    if list_known:
        return list_models()
    if not models:
        raise UserError("Which model? Give a name, a directory or a file; `trivet plan --list` shows the known names.")
    names = tuple(name for name in hardware.split(",") if name)
    if (tokens is not None or price is not None) and not names:
        raise UserError("--tokens and --price need --hardware, e.g. --hardware h100.")
    if measure and (names or plot is not None or (shards or 1) * (expert_shards or 1) > 1):
        raise UserError("--measure runs on this machine alone: leave --hardware, --plot and shards out.")
    given = {
        "context": context, "generate": generate, "hardware": names, "batch": batch, "rows": rows, "length": length,
        "precision": precision, "recompute": recompute, "offload": offload, "shards": shards, "expert_shards": expert_shards,
        "tokens": tokens, "mfu": mfu, "price": price,
    }  # fmt: skip
    ask = validate(given, Question, "trivet plan")
    if measure:
        measure_models(models, ask, device, as_json)
    else:
        plan_models(models, ask, as_json, plot)


# ------------------------------------------------------------------------------------------- helpers
def _one_stage(
    config: Path, schema: Any, overrides: list[str] | None, out: Path, device: str, together: bool = False
) -> None:
    """together: as one of the processes that torchrun started, if it did."""
    from trivet.config import load
    from trivet.recipes.kinds.base import Context
    from trivet.recipes.progress import Live
    from trivet.recipes.stages import run_stage
    from trivet.train.parallel import first, processes

    stage = load(config, schema, overrides or [])
    wanted = _device(device, stage.threads, together)
    with _interruptible(), processes(wanted) as on, Live() as live:
        progress = live.watch(out.name, stage) if first() else None
        run_stage(stage, Context(out, out.parent, None, on, progress, live.say if first() else lambda text: None))


@contextmanager
def _interruptible() -> Iterator[None]:
    """An interrupt is no crash: it ends with what there is to say about going on."""
    try:
        yield
    except KeyboardInterrupt as e:
        if RANK == 0:
            print(f"\ntrivet: {e or 'stopped'}", file=sys.stderr)
        raise typer.Exit(130) from None


def _device(name: str, threads: int = 0, together: bool = False) -> torch.device:
    import torch

    if not together and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "Several processes (WORLD_SIZE is set) only work together in `trivet train`, `rl` and `run`: start this without torchrun."
        )

    from trivet.recipes.memory import keep_freed_memory

    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name!r} can't be used: {str(e).splitlines()[0]}") from None
    return torch.device(name)


def _budgets(text: str, no_think: bool) -> list[Any]:
    if no_think:
        return ["off"]
    budgets: list[Any] = []
    for word in text.split(","):
        if word in ("none", "unlimited"):
            budgets.append(None)
        elif word == "off" or word.isdigit():
            budgets.append("off" if word == "off" else int(word))
        else:
            raise UserError(
                f"--budgets: {word!r} is no budget; write numbers, 'off' or 'none', for example 0,8,32,none."
            )
    return budgets


def main() -> None:
    """Entry point: what a person can mend is one sentence."""
    try:
        app(standalone_mode=True)
    except UserError as e:
        sys.exit(f"trivet: {e}" if RANK == 0 else f"trivet (process {RANK}): {e}")
    except BrokenPipeError:  # `trivet ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
