"""Wrong input of all kinds to all commands: one line and a hint, exit status 1 or 2, and nothing written."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.command_line import Call

RUN = "abliterate run --model nowhere/ --name x"
EVALUATE = "abliterate evaluate --base nowhere/"
APPLY = "abliterate apply --model nowhere/ --output-dir out"
LINES = [
    "abliterate runn",
    "abliterate run --model demo",
    "abliterate run --model '' --name x",
    "abliterate run --model ' ' --name x",
    "abliterate run --model empty --name x",
    "abliterate run --model file --name x",
    "abliterate run --model demo --name ../x",
    "abliterate run --model demo --name ''",
    "abliterate run --model demo --name a/b/c/d",
    f"{RUN} --harmful missing.txt",
    f"{RUN} --harmful empty",
    f"{RUN} --harmful file",
    f"{RUN} --harmful none.txt",
    f"{RUN} --harmful-dir empty",
    f"{RUN} --harmful table.csv --harmless table.csv",
    f"{RUN} --column a",
    f"{RUN} --num-instructions 0",
    f"{RUN} --max-measured -1",
    f"{RUN} --seed -1",
    f"{RUN} --seed 99999999999",
    f"{RUN} --device gpu",
    f"{RUN} --dtype int8",
    f"{RUN} --batch-size 0",
    f"{RUN} --memory 0",
    f"{RUN} --memory lots",
    f"{RUN} --template-kwargs [1]",
    f"{RUN} --layer-fracs ''",
    f"{RUN} --layer-fracs nan",
    f"{RUN} --position 0",
    f"{RUN} --num-directions 4",
    f"{RUN} --targets wrtiers",
    f"{RUN} --strength nan",
    f"{RUN} --skip-end-layers -1",
    f"{RUN} --workers 0",
    f"{RUN} --max-kl nan",
    f"{RUN} --auto --trials 0",
    f"{RUN} --quant Q9",
    f"{RUN} --quant Q8_0 --no-requantize",
    f"{RUN} --parameter temperature=hot",
    f"{RUN} --ollama-prompts -1",
    f"{RUN} --config missing.toml",
    f"{RUN} --config empty",
    f"{RUN} --output-dir file",
    f"{APPLY}",
    f"{APPLY} --refusal-pt file --edit file",
    f"{APPLY} --trial 1",
    f"{APPLY} --refusal-pt missing.pt --output out.gguf",
    "abliterate apply --model empty --undo --output-dir out",
    "abliterate compute-dir --model nowhere/ --output out.txt",
    "abliterate inspect --model nowhere/",
    "abliterate inspect --model ollama:",
    "abliterate plan --model nowhere/ --read-speed 0",
    f"{EVALUATE} --checkpoint demo --preserve missing.txt",
    f"{EVALUATE} --checkpoint demo --max-measured -1",
    f"{EVALUATE} --checkpoint demo --vllm-args x",
    f"{EVALUATE} --checkpoint demo --output-dir file",
    f"{EVALUATE} --engine-url nonsense",
    f"{EVALUATE} --checkpoint demo --judge http://127.0.0.1:9",
    "abliterate optimize --model nowhere/ --study out --trials 0",
    "abliterate optimize --model nowhere/ --study out --workers 0",
    "abliterate optimize --model nowhere/ --study out --max-kl 0",
    "abliterate optimize --model nowhere/ --study out --seed -1",
    "abliterate chat",
    "abliterate chat --checkpoint nowhere/",
    "abliterate chat --checkpoint demo --think --no-think",
    "abliterate chat --checkpoint demo --format file",
    "abliterate chat --checkpoint demo --image file",
    "abliterate serve",
    "abliterate serve --checkpoint nowhere/ --port 0",
    "abliterate serve --checkpoint demo --port 99999",
    "abliterate serve --checkpoint demo --name a --name b",
    "abliterate push --name x --repo nonsense",
    "abliterate push --name x --repo a/b --only nothing",
    "abliterate export-adapter --model nowhere/ --edit missing --output out",
    "abliterate download-lists --output-dir out --timeout 0",
    "abliterate download-lists --output-dir out --timeout nan",
    "abliterate download-lists --output-dir out --source-base nonsense",
    "convert --gguf missing.gguf --name x",
    "convert --gguf file --name 'a b'",
    "refresh-template --name '' --base ''",
    "runs --folder missing",
    "runs rm ../..",
    "cache rm ../..",
    "config show nothing",
    "completion",
    "completion tcsh",
]


@pytest.mark.parametrize("line", LINES)
def test_one_line_a_hint_and_nothing_written(forge: Call, tmp_path: Path, line: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"\xff\xfe\x00\x00x")
    (tmp_path / "none.txt").write_text("# nothing\n", encoding="utf-8")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    before = set(tmp_path.rglob("*"))
    said = forge(*shlex.split(line))
    assert said.status in (1, 2)
    assert said.out == ""
    error, hint = said.err.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert "internal error" not in error
    assert set(tmp_path.rglob("*")) == before
