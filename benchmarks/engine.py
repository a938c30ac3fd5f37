"""What the engine saves: prefixes over a conversation's turns, guesses ahead, and what a grammar costs.

    python benchmarks/engine.py turns                          # 10 turns, with and without the prefix store
    trivet run configs/guess.toml --out runs/guess             # a model with a prediction module, and a draft
    python benchmarks/engine.py guess --model runs/guess/target --draft runs/guess/draft
    python benchmarks/engine.py weights --model runs/guess/target    # loss and speed with int8 and int4 weights
    python benchmarks/engine.py grammar                        # a JSON schema at batch 64

Every comparison checks that both sides wrote the same tokens before it says how fast they were.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import DTYPES, arguments, machine, seconds, take_turns, write
from trivet.chat import Chat, tiny_chat
from trivet.engine import PREFIX_BYTES, Engine, Request
from trivet.engine.speculate import MTP, Draft, Drafter, NGram
from trivet.hub.checkpoint import load_pair
from trivet.messages import Completion, Grammar, Message, Sampling
from trivet.model import Transformer
from trivet.model.quant import quantise
from trivet.spec import GQA, MLA, Lightning, ModelSpec, Rope, SwiGLU
from trivet.tasks import make_task

SHAPE = {"heads": 8, "rope": Rope(dims=16)}
PATTERNS = {"gqa": "gqa/dense*4", "mla": "mla/dense*4", "hybrid": "lightning/dense*3 gqa/dense"}


def model_of(pattern: str, chat: Chat, device: str) -> Transformer:
    spec = ModelSpec(
        vocab_size=chat.vocab_size, d_model=256, pattern=pattern, context_length=8192,
        mixers={
            "gqa": GQA(kv_heads=4, head_dim=32, **SHAPE), "mla": MLA(kv_rank=64, nope_dim=32, v_dim=32, **SHAPE),
            "lightning": Lightning(heads=8, head_dim=32),
        },
        ffns={"dense": SwiGLU(hidden=704)},
    )  # fmt: skip
    return Transformer(spec, seed=0).eval().to(device)


# ------------------------------------------------------------------------------------------- turns
def turns(args: argparse.Namespace, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation of `turns` turns: each adds a question, and the model answers `new` tokens."""
    chat, results = tiny_chat(), []
    questions = torch.randint(
        20, chat.vocab_size, (args.turns, args.question), generator=torch.Generator().manual_seed(0)
    )
    for name, pattern in PATTERNS.items():
        model = model_of(pattern, chat, args.device)

        def talk(prefix_bytes: int, model: Transformer = model) -> tuple[list[Completion], int]:
            engine = Engine(model, chat, 1, args.turns * (args.question + args.new) + 16, prefix_bytes=prefix_bytes)
            history: tuple[int, ...] = ()
            said = []
            for question in questions.tolist():
                history = (*history, *question)
                sampling = Sampling(temperature=0.0, max_tokens=args.new, thinking="off", answer_reserve=0)
                (c,) = engine.generate([Request(history, sampling)])
                history = (*history, *c.tokens)
                said.append(c)
            return said, engine.stats.prompt_tokens

        (kept, few), (again, many) = talk(PREFIX_BYTES), talk(0)
        same = sum(a.tokens == b.tokens for a, b in zip(kept, again, strict=True))
        times = take_turns({"kept": lambda: talk(PREFIX_BYTES), "again": lambda: talk(0)}, args.rounds, args.device)
        ratio = times["again"] / times["kept"]
        print(f"{name:7} {args.turns} turns: {few:,} prompt tokens computed instead of {many:,}, {times['kept']:.2f} s "
              f"instead of {times['again']:.2f} s, {ratio:.2f}x; {same} of {args.turns} answers equal")  # fmt: skip
        results.append({"shape": name, "computed": few, "without": many, "ratio": ratio, "equal": same} | times)
    return results


# ------------------------------------------------------------------------------------------- guess
def guess(args: argparse.Namespace, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The same requests with every drafter; greedy and at temperature 1; one at a time and 16 at once."""
    model, chat = load_pair(args.model, args.device)
    model.eval()
    small = load_pair(args.draft, args.device)[0].eval()
    task, results = make_task({"name": "chain", "min_steps": 8, "max_steps": 12}), []
    prompts = [
        tuple(chat.render([Message("user", task.problem("test", i, None).prompt)], generate=True).ids)
        for i in range(args.count)
    ]
    makers: dict[str, Callable[[], Drafter | None]] = {"none": lambda: None}
    for ahead in args.ahead:
        makers |= {
            f"n-gram {ahead}": lambda a=ahead: NGram(a), f"draft {ahead}": lambda a=ahead: Draft(small, model, a),
            f"mtp {ahead}": lambda a=ahead: MTP(model, a),
        }  # fmt: skip
    for rows in (1, 16):
        for temperature in (0.0, 1.0):
            asked = [
                Request(p, Sampling(temperature=temperature, seed=i, max_tokens=args.new)) for i, p in enumerate(prompts)
            ]  # fmt: skip
            engines: dict[str, Engine] = {}

            def run(
                name: str, asked: list[Request] = asked, rows: int = rows, engines: dict[str, Engine] = engines
            ) -> list[Completion]:
                engines[name] = Engine(model, chat, rows, 512, drafter=makers[name]())
                return engines[name].generate(asked)

            want = run("none")
            different = {n: sum(a.tokens != b.tokens for a, b in zip(run(n), want, strict=True)) for n in makers}
            times = take_turns({n: (lambda n=n: run(n)) for n in makers}, args.rounds, args.device)
            tokens = sum(len(c.tokens) for c in want)
            for name in makers:
                stats = engines[name].stats
                right = stats.right_tokens / max(stats.guessed_tokens, 1)
                print(f"{rows:2} rows T={temperature:g} {name:9} {tokens / times[name]:7.0f} tok/s  "
                      f"{times['none'] / times[name]:5.2f}x  guesses right {right:6.1%}  "
                      f"answers that differ {different[name]} of {len(asked)}")  # fmt: skip
                results.append({"rows": rows, "temperature": temperature, "drafter": name, "right": right,
                                "ratio": times["none"] / times[name], "tokens_per_s": tokens / times[name],
                                "different": different[name]})  # fmt: skip
    return results


# ----------------------------------------------------------------------------------------- weights
def weights(args: argparse.Namespace, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Loss a token on worked examples that were held out, and decoding speed, by the type of the weights."""
    task, results = make_task({"name": "chain", "min_steps": 2, "max_steps": 12}), []
    models: dict[str, Transformer] = {}
    for name, dtype, bits in (("fp32", "fp32", None), ("int8", "fp32", "int8"), ("bf16", "bf16", None),
                              ("bf16, int8", "bf16", "int8"), ("bf16, int4", "bf16", "int4")):  # fmt: skip
        model, chat = load_pair(args.model, args.device, DTYPES[dtype])
        size = sum(p.nbytes for p in model.parameters())
        models[name] = model.eval()
        if bits is not None:
            _, size, _ = quantise(model, bits)  # type: ignore[arg-type]
        total, count = 0.0, 0
        for i in range(args.count * 8):
            problem = task.problem("test", i, None)
            rendered = chat.render(task.demonstrate(problem, random.Random(i)).messages)
            ids, mask = torch.tensor([rendered.ids], device=args.device), torch.tensor(rendered.mask[1:])
            with torch.inference_mode():
                logp = model.logits(model(ids)).float().log_softmax(-1)[0, :-1]
            own = logp.gather(-1, ids[0, 1:, None]).squeeze(-1).cpu()[mask]
            total, count = total - float(own.sum()), count + len(own)
        results.append({"weights": name, "loss": total / count, "perplexity": math.exp(total / count), "bytes": size})
    asked = [
        Request(
            tuple(range(20, 60)),
            Sampling(temperature=0.0, max_tokens=args.new, thinking="off", logit_bias=((chat.end_id, -100.0),)),
        )
    ]
    times = take_turns(
        {n: (lambda m=m: Engine(m, chat, 1, 512).generate(asked)) for n, m in models.items()}, args.rounds, args.device
    )
    for r in results:
        r["tokens_per_s"] = args.new / times[r["weights"]]
        print(
            f"{r['weights']:11} {r['bytes'] / 1e6:6.2f} MB  loss {r['loss']:.5f}  perplexity {r['perplexity']:.4f}  {r['tokens_per_s']:6.0f} tok/s at batch 1"
        )
    return results


# ----------------------------------------------------------------------------------------- grammar
def grammar(args: argparse.Namespace, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """64 rows bound by a JSON schema against 64 free rows of as many tokens."""
    chat = tiny_chat()
    schema = {"type": "array", "items": {"type": "object", "additionalProperties": False, "required": ["name", "n"],
                                         "properties": {"name": {"type": "string"}, "n": {"type": "integer"}}}}  # fmt: skip
    model = model_of(PATTERNS["gqa"], chat, args.device)
    bound = Grammar("json_schema", json.dumps(schema))
    prompt = tuple(chat.render([Message("user", "1=")], generate=True).ids)

    def run(rule: Grammar | None) -> Engine:
        engine = Engine(model, chat, 64, 256)
        for i in range(64):
            sampling = Sampling(
                seed=i, max_tokens=args.new, thinking="off", grammar=rule, answer_reserve=0,
                logit_bias=((chat.end_id, -100.0),),
            )  # fmt: skip
            engine.add(Request(prompt, sampling))
        while engine.busy:
            engine.step()
        return engine

    def step(rule: Grammar | None) -> float:
        return seconds(lambda: run(rule), args.device) / args.new

    rounds = [(step(bound), step(None)) for _ in range(args.rounds)]
    with_, without = (sorted(times)[len(times) // 2] for times in zip(*rounds, strict=True))
    print(
        f"64 rows: {with_ * 1e3:.2f} ms a step with a schema, {without * 1e3:.2f} without: +{with_ / without - 1:.1%}"
    )
    return [{"with_s": with_, "without_s": without}]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("what", choices=["turns", "guess", "grammar", "weights"])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--question", type=int, default=200, help="tokens a question")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--model", type=Path, help="for guess: a model with a prediction module")
    parser.add_argument("--draft", type=Path, help="for guess: a small one")
    parser.add_argument("--ahead", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4])
    parser.add_argument("--count", type=int, default=32, help="requests")
    args = parser.parse_args()
    facts = machine(args)
    results = {"turns": turns, "guess": guess, "grammar": grammar, "weights": weights}[args.what](args, facts)
    write(args.out, {"benchmark": f"engine {args.what}", "machine": facts, "results": results})


if __name__ == "__main__":
    main()
