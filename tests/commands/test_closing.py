"""The last lines of a command: the printed command is one that the command line takes."""

import json
import shlex
import sys
from pathlib import Path

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from ddpm_jax import cli, config, modes
from ddpm_jax.commands import closing, serve
from ddpm_jax.runtime import workdir

MODES_WITHOUT = ("doctor", "plan", "serve")  # after which nothing suggests itself


def write_run(folder, *, dataset=(), finished=True, stages=(), **fields):
    """The files of a workdir by which the next command is chosen."""
    settings = config.default_config()
    settings.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    folder.mkdir(parents=True)
    (folder / workdir.CONFIG).write_text(config.to_json(settings))
    (folder / workdir.DATASET).write_text(json.dumps(dict(dataset)))
    (folder / "checkpoints" / "8").mkdir(parents=True)
    workdir.note(folder, "finished" if finished else "stopped", 8)
    if stages:
        entries = [{"workdir": stage, "step": 8, "size": [8, 8, 1]} for stage in stages]
        (folder / workdir.STAGES).write_text(json.dumps({"stages": entries}))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder with a run of each kind, in which the commands are typed."""
    captions = {"shown_captions": ["one", "it's a  \nred house " * 9, "three"]}
    imported = {"imported": "elsewhere"}
    write_run(tmp_path / "runs/digits")
    write_run(tmp_path / "runs/captions", dataset=captions)
    write_run(tmp_path / "runs/stopped", finished=False)
    write_run(tmp_path / "runs/autoencoder", train__objective="autoencoder")
    write_run(tmp_path / "runs/clip", train__objective="clip")
    write_run(tmp_path / "runs/prior", dataset=captions, prior__clip="runs/clip")
    write_run(tmp_path / "runs/unclip", dataset=captions, stages=("../prior", "../captions"))
    write_run(tmp_path / "runs/sd", dataset=imported | {"shown_captions": [""]})
    write_run(tmp_path / "runs/sd_inpainting", dataset=imported | {"shown_captions": [""]}, model__masked_picture=True)
    write_run(tmp_path / "runs/if2", dataset=imported | {"shown_captions": [""]}, upscale__height=8, upscale__width=8)
    write_run(tmp_path / "runs/karlo", dataset=imported | captions, embedding__clip="clip")
    write_run(tmp_path / "runs/lora", dataset=captions, train__init_from="runs/sd", lora__rank=4)
    write_run(tmp_path / "runs/odd name", dataset=imported)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    monkeypatch.setattr(serve, "missing_packages", lambda: ["starlette"])
    return tmp_path / "runs"


def parsed(words, monkeypatch):
    """The mode of a command of main.py, whose flags are parsed as the command line does it."""
    assert words[:2] == ["python", "main.py"]
    monkeypatch.setattr(sys, "argv", words[1:])
    with flagsaver.flagsaver():
        cli.parse_flags(words[1:])
        modes.chosen(flags.FLAGS["mode"].value)  # which refuses flags that do nothing
        mode = flags.FLAGS["mode"].value
        assert flags.FLAGS["workdir"].value
    monkeypatch.setattr(sys, "argv", ["main.py"])
    return mode


CASES = [
    # mode, workdir, given flags, the command after it
    ("train", "digits", {}, "--mode=sample --workdir=runs/digits"),
    ("train", "captions", {}, """--mode=sample --workdir=runs/captions --prompt='it'"'"'s a red house"""),
    ("train", "autoencoder", {}, "--mode=export --workdir=runs/autoencoder --out=autoencoder-diffusers"),
    ("train", "clip", {}, "--mode=evaluate --workdir=runs/clip"),
    ("train", "prior", {}, "--mode=compose --stages=runs/prior,DECODER --workdir=runs/prior_pipeline"),
    ("report", "stopped", {}, "--mode=sample --workdir=runs/stopped"),
    ("prepare", "digits", {}, "--workdir=runs/digits"),
    ("compose", "unclip", {}, "--mode=sample --workdir=runs/unclip --prompt='it"),
    ("import", "sd", {}, "--mode=sample --workdir=runs/sd --prompt='a lighthouse by the sea'"),
    ("import", "odd name", {}, "--mode=sample --workdir='runs/odd name'"),
    ("import", "sd_inpainting", {}, "--mode=inpaint --workdir=runs/sd_inpainting --prompt='a lighthouse by the sea'"),
    ("import", "if2", {}, "--mode=upscale --workdir=runs/if2 --prompt='a lighthouse by the sea' --input=PICTURE.png"),
    ("import", "karlo", {}, "--mode=variations --workdir=runs/karlo --prompt='it"),
    (
        "export",
        "digits",
        {"out": "a.safetensors"},
        "--mode=import --source=a.safetensors --workdir=runs/digits_imported",
    ),
    ("export", "lora", {"out": "a.safetensors", "adapters": True}, "--mode=sample --workdir=runs/sd --prompt='a light"),
    ("sample", "digits", {}, "--mode=progressive --workdir=runs/digits"),
    ("sample", "captions", {"prompt": ["two", "six"]}, "--mode=progressive --workdir=runs/captions --prompt=two"),
    ("sample", "captions", {"prompt": ["two"], "guidance_scale": 2.5}, "--prompt=two --guidance_scale=2.5"),
    ("sample", "unclip", {"prompt": ["two"], "guidance_scale": [2.0, 1.0]}, "--prompt=two --guidance_scale=2,1"),
    ("vary", "sd", {"guidance_scale": 3.0, "lora": ["a", "b:2"]}, "--guidance_scale=3 --lora=a --lora=b:2 --seed=1"),
    ("sample", "digits", {"images": "0-9"}, "--mode=evaluate --workdir=runs/digits --generated=a.png"),
    ("sample", "sd", {"images": "0-9"}, "--mode=evaluate --workdir=runs/sd --generated=a.png --against=PICTURES"),
    ("sample", "prior", {}, "--mode=compose --stages=runs/prior,DECODER"),
    ("vary", "digits", {}, "--mode=sample --workdir=runs/digits --seed=1"),
    ("vary", "captions", {"prompt": ["two"], "seed": 2**32 - 1}, "--workdir=runs/captions --prompt=two --seed=0"),
    ("evaluate", "digits", {}, "--mode=neighbours --workdir=runs/digits"),
    ("evaluate", "clip", {}, "--mode=export --workdir=runs/clip --out=clip-transformers"),
    ("evaluate", "sd", {"seed": 4}, "--mode=sample --workdir=runs/sd --prompt='a lighthouse by the sea' --seed=5"),
]


@pytest.mark.parametrize(("mode", "name", "given", "expected"), CASES)
def test_the_next_command_can_be_typed(runs, monkeypatch, capsys, mode, name, given, expected):
    closing.tell(mode, f"runs/{name}", Path(given.get("out", "a.png")), given)
    line = capsys.readouterr().err
    assert line.startswith("next:  python main.py ")
    assert line.count("\n") == 1
    assert expected in line
    parsed(shlex.split(line.removeprefix("next:")), monkeypatch)


@pytest.mark.parametrize("mode", modes.FUNCTIONS)
def test_every_mode_ends_so(runs, monkeypatch, capsys, mode):
    closing.tell(mode, "runs/digits", (Path("a.png"), Path("a.gif")), {}, "step 8, EMA 0.9")
    said = capsys.readouterr()
    files = "runs/digits/evaluation.md" if mode == "evaluate" else "a.png, a.gif"
    assert said.out == f"wrote: {files} (step 8, EMA 0.9)\n"
    assert (said.err == "") == (mode in MODES_WITHOUT)
    if mode == "export":
        assert "DiffusionPipeline.from_pretrained" in said.err
    elif said.err:
        parsed(shlex.split(said.err.removeprefix("next:")), monkeypatch)


def test_with_the_playground_installed(runs, monkeypatch, capsys):
    monkeypatch.setattr(serve, "missing_packages", list)
    closing.tell("vary", "runs/digits", Path("a.png"), {"lora": ["a:2"], "guidance_scale": 3.0})
    line = capsys.readouterr().err
    assert line == "next:  python main.py --mode=serve --workdir=runs/digits --lora=a:2\n"
    assert parsed(shlex.split(line.removeprefix("next:")), monkeypatch) == "serve"


def test_prepared_images_are_trained_on_with_the_same_config(runs, monkeypatch, capsys):
    """The --config flags go into the next command as they were given."""
    words = ["main.py", "--mode=prepare", "--config=configs/cifar10.py", "--config.model.channel_multipliers=(1, 2)"]
    words += ["--config.data.data_dir=a folder", "--config.data.flip=False"]
    monkeypatch.setattr(sys, "argv", words)
    with flagsaver.flagsaver():
        cli.parse_flags(words)
        given = {"config": modes._config_flags()}
    monkeypatch.setattr(sys, "argv", ["main.py"])
    closing.tell("prepare", "", None, given)
    said = capsys.readouterr()
    assert said.out == ""
    again = shlex.split(said.err.removeprefix("next:"))
    assert again[-1] == "--workdir=runs/cifar10"
    monkeypatch.setattr(sys, "argv", again[1:])
    with flagsaver.flagsaver():
        cli.parse_flags(again[1:])
        found = flags.FLAGS["config"].value
        assert tuple(found.model.channel_multipliers) == (1, 2)
        assert (found.data.data_dir, found.data.flip) == ("a folder", False)


@pytest.mark.parametrize(
    ("name", "opened"),
    [
        ("digits", "from diffusers import DiffusionPipeline; print(DiffusionPipeline"),
        ("autoencoder", "from diffusers import AutoencoderKL; print(AutoencoderKL"),
        ("clip", "from transformers import CLIPModel; print(CLIPModel"),
    ],
)
def test_exported_folders_are_opened_in_python(runs, capsys, name, opened):
    closing.tell("export", f"runs/{name}", Path("it's out"), {"out": "it's out"})
    words = shlex.split(capsys.readouterr().err.removeprefix("next:"))
    assert words == ["python", "-c", f'{opened}.from_pretrained("it\'s out"))']
    compile(words[2], "command", "exec")


@pytest.mark.parametrize(
    ("mode", "workdir"),
    [("train", "runs/stopped"), ("evaluate", "results"), *((mode, "runs/digits") for mode in MODES_WITHOUT)],
)
def test_where_nothing_suggests_itself(runs, capsys, mode, workdir):
    """For example after a stopped run, where the loop already says how to resume, or two compared sets of images."""
    closing.tell(mode, workdir, None, {})
    assert capsys.readouterr().err == ""


def test_other_processes_are_silent(runs, monkeypatch, capsys):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    closing.tell("sample", "runs/digits", Path("a.png"), {})
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("argv", "start"), [("main.py", "python main.py"), ("/clone/ddpm_jax/__main__.py", "python -m ddpm_jax")]
)
def test_it_starts_as_the_command_did(runs, monkeypatch, capsys, argv, start):
    monkeypatch.setattr(sys, "argv", [argv])
    closing.tell("train", "runs/digits", None, {})
    assert capsys.readouterr().err == f"next:  {start} --mode=sample --workdir=runs/digits\n"
