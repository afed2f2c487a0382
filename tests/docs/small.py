"""The documentation's commands, made small enough to be run by a test.

A ``Workbench`` is a folder in which one page's commands run one after another. What it changes:

    train SOURCE --out RUN    the geometry, the text, the steps (``SMALL``); nothing else
    train --resume RUN        train.steps, if it is given: two more than the run has
    text to read              built-in and hf: sources become a small text; files that do not exist
                              are made, JSON lines if the name says so
    RUN to read               a run that no earlier command made is trained first; a step-N becomes
                              the newest step there is
    data                      bpe:SIZE becomes bpe:300
    generate, chat, eval      --max-tokens 8 (200 for eval); a missing file of prompts or of BLiMP
                              is made; chat hears three lines
    serve                     on any free port, and told to end as soon as it says where it is
    explore                   --json, which prints and leaves
    bench serve               4 requests, of a run also where a server's address stands

So a page stands alone and may be changed freely, as long as its commands are real ones. Every
file and folder it names is relative to the workbench.
"""

import gzip
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from deltamoe.checkpoint import load_run_config, step_folders
from deltamoe.cli import VERBS, main
from deltamoe.config import PRESETS, RunConfig, resolve
from deltamoe.data.builtin import BUILT_IN

__all__ = ["CHAT", "SMALL", "Workbench"]

SMALL = {
    "model.vocab_size": "300",
    "model.dim": "24",
    "model.num_layers": "4",
    "model.mlp_dim": "40",
    "model.mixers": "none",
    "model.channels": "none",
    "model.kda.num_heads": "2",
    "model.kda.num_value_heads": "none",
    "model.kda.key_dim": "8",
    "model.kda.value_dim": "8",  # as wide as the keys, or it could not be exported
    "model.kda.decay_rank": "none",
    "model.kda.output_gate_rank": "none",
    "model.mla.num_heads": "2",
    "model.mla.latent_dim": "16",
    "model.mla.nope_dim": "8",
    "model.mla.rope_dim": "4",
    "model.mla.value_dim": "6",
    "model.mla.query_rank": "none",
    "model.moe.num_experts": "4",
    "model.moe.experts_per_token": "2",
    "model.moe.expert_dim": "8",
    "model.moe.num_groups": "1",
    "model.moe.groups_per_token": "1",
    "data.tokenizer": "bytes",
    "data.context": "32",
    "data.rows": "2",
    "optimizer.warmup_steps": "1",
    "train.steps": "4",
    "train.accumulate": "1",
    "train.checkpoint_every": "2",
    "train.validate_every": "2",
    "train.validation_tokens": "64",
    "train.compile": "false",
    "train.threads": "1",
}

CHAT = "Once\n/stats\n/quit\n"

_TEXT = "".join(
    f"def f{i}(x):\n    return x * {i % 7} + {i % 11}  # the {i}th é\n\n" for i in range(120)
)
_STEP = re.compile(r"(.+?)/checkpoints/step-\d+(/.*)?")


@dataclass
class Workbench:
    """Runs the words of commands in a folder; the process stands in that folder.

    Attributes:
        folder: empty at first.
    """

    folder: Path
    _lent: set[str] = field(default_factory=set)

    def run(self, words: Sequence[str]) -> int:
        """The exit code of a documented ``deltamoe`` command, made small."""
        small = self.small(words)
        return _served(small) if small[0] == "serve" and "--help" not in small else main(small)

    def small(self, words: Sequence[str]) -> list[str]:
        """What is given to the program in place of a documented command's words."""
        verb, *rest = words
        if verb not in VERBS or "--help" in rest:
            return list(words)
        smaller = {
            "train": self._train,
            "generate": self._reader,
            "chat": self._reader,
            "eval": self._reader,
            "inspect": self._reader,
            "trace": self._reader,
            "verify": self._reader,
            "explore": self._explore,
            "serve": self._serve,
            "bench": self._bench,
            "convert": self._convert,
            "quantize": self._convert,
            "plan": self._configured,
            "config": self._configured,
            "data": self._data,
        }
        return [verb, *smaller[verb](verb, rest)] if verb in smaller else list(words)

    def trained(self, name: str) -> str:
        """The path of a run, or of something in one, trained first if it is not there."""
        step = _STEP.fullmatch(name)
        run = step[1] if step else name.rstrip("/")
        if not (self.folder / run).exists():
            overrides = _small_overrides(resolve("nano")[0], {"data.path": self.text("stdlib")})
            assert main(["train", "nano", "--out", run, *overrides]) == 0
            self._lent.add(run)
        if not step:
            return name
        newest = step_folders(run)[-1]
        return f"{newest}{step[2] or ''}"

    def text(self, name: str) -> str:
        """The name of a small text that stands for a source of text."""
        if name in BUILT_IN or name.startswith("hf:"):
            name = "small.txt"
        path = self.folder / name
        if path.exists():
            return name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps({"text": part}) + "\n" for part in _TEXT.split("\n\n"))
        if name.endswith(".jsonl.gz"):
            path.write_bytes(gzip.compress(lines.encode()))
        elif path.suffix in (".jsonl", ".ndjson"):
            path.write_text(lines, encoding="utf-8")
        elif path.suffix:
            path.write_text(_TEXT, encoding="utf-8")
        else:
            path.mkdir()
            for number, part in enumerate(_TEXT.split("\n\n")):
                (path / f"{number}.txt").write_text(f"{part}\n", encoding="utf-8")
        return name

    def _train(self, verb: str, words: list[str]) -> list[str]:
        given = _parsed(import_module("deltamoe.cli.train").command, words)
        source, overrides = given["source"], given.get("overrides", ())
        out = given.get("out") or (source if given.get("resume") else "run")
        keys = {override.partition("=")[0] for override in overrides}
        if out == source:
            return [*words, *self._changes(self.trained(out), keys)]
        if out in self._lent and not given.get("resume"):
            shutil.rmtree(self.folder / out)
            self._lent.remove(out)
        config, _ = resolve(source, overrides)
        small = _small_overrides(config, self._texts(config))
        if given.get("resume") and (self.folder / out).exists():
            small += self._changes(out, keys)
        return [*words, *small]

    def _changes(self, run: str, keys: set[str]) -> list[str]:
        """Overrides for going on with a small run where a large one would be changed."""
        steps = load_run_config(run).train.steps + 2
        changes = {"train.steps": str(steps), "data.path": self.text("stdlib")}
        return [f"{key}={value}" for key, value in changes.items() if key in keys]

    def _texts(self, config: RunConfig) -> dict[str, str]:
        names = config.data.mixture or {config.data.path: 1.0}
        texts = [
            # two built-in sources must stay two
            (self.text(name if number == 0 else f"{number}.txt"), weight)
            for number, (name, weight) in enumerate(names.items())
        ]
        if config.data.mixture:
            return {"data.mixture": ",".join(f"{name}:{weight}" for name, weight in texts)}
        return {"data.path": texts[0][0]}

    def _reader(self, verb: str, words: list[str]) -> list[str]:
        given = _parsed(import_module(f"deltamoe.cli.{verb}").command, words)
        words = _replaced(words, given["path"], self.trained(given["path"]))
        if prompts := given.get("prompts_from"):
            self._make(prompts, "Once\nTwice\n")
        if name := given.get("name"):
            words = _replaced(words, name, self.text(name))
        if blimp := given.get("blimp"):
            pair = json.dumps({"sentence_good": "It is.", "sentence_bad": "It are."})
            self._make(f"{blimp}/agreement.jsonl", pair)
        limit = {"generate": "8", "chat": "8", "trace": "8", "eval": "200"}.get(verb)
        return [*words, "--max-tokens", limit] if limit else words

    def _explore(self, verb: str, words: list[str]) -> list[str]:
        path = _parsed(import_module("deltamoe.cli.explore").command, words)["path"]
        if Path(path).suffix != ".safetensors":
            words = _replaced(words, path, self.trained(path))
        return [*words, "--json"]

    def _serve(self, verb: str, words: list[str]) -> list[str]:
        path = _parsed(import_module("deltamoe.cli.serve").command, words)["path"]
        return [*_replaced(words, path, self.trained(path)), "--port", "0"]

    def _bench(self, verb: str, words: list[str]) -> list[str]:
        _, target, *_ = words
        run = self.trained("runs/demo" if target.startswith("http") else target)
        small = ["--requests", "4", "--prompt-tokens", "8", "--answer-tokens", "4"]
        return [*_replaced(words, target, run), *small]

    def _convert(self, verb: str, words: list[str]) -> list[str]:
        source = _parsed(import_module(f"deltamoe.cli.{verb}").command, words)["source"]
        return _replaced(words, source, self.trained(source))

    def _configured(self, verb: str, words: list[str]) -> list[str]:
        command = import_module(f"deltamoe.cli.{verb}").command
        if verb == "config":
            if words[0] != "show":
                return words
            command, words = command.commands["show"], words[1:]
        name = _parsed(command, words)["config"]
        if name not in PRESETS and not name.endswith((".toml", ".json")):
            words = _replaced(words, name, self.trained(name))
        return ["show", *words] if verb == "config" else words

    def _data(self, verb: str, words: list[str]) -> list[str]:
        name, *rest = words
        command = import_module("deltamoe.cli.data").command.commands[name]
        given = _parsed(command, rest)
        if source := given.get("source"):
            rest = _replaced(rest, source, self.text(source))
        return [name, *(re.sub(r"^bpe:\d+$", "bpe:300", word) for word in rest)]

    def _make(self, name: str, content: str) -> None:
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")


def _small_overrides(config: RunConfig, texts: dict[str, str]) -> list[str]:
    """``SMALL`` as far as the configuration has the sections, and where the text is."""
    model = config.model
    absent = tuple(
        f"model.{part}." for part in ("kda", "mla", "moe") if getattr(model, part) is None
    )
    wanted = {**SMALL, **texts}
    return [f"{key}={value}" for key, value in wanted.items() if not key.startswith(absent or "-")]


def _parsed(command: click.Command, words: list[str]) -> dict[str, Any]:
    """Options and arguments as text, without opening any file."""
    given, _, _ = command.make_parser(click.Context(command)).parse_args(list(words))
    return {name: value for name, value in given.items() if isinstance(value, str | tuple | bool)}


def _replaced(words: list[str], old: str, new: str) -> list[str]:
    return [new if word == old else word for word in words]


def _served(words: list[str]) -> int:
    """The exit code of a server that is asked to end once it is well."""
    command = [sys.executable, "-m", "deltamoe", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        said = ""
        while not (found := re.search(r"http://[\d.]+:\d+", said)):
            line = process.stdout.readline().decode()
            assert line, f"the server ended: {said}"
            said += line
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                urllib.request.urlopen(f"{found[0]}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        return process.wait(timeout=60)
