"""A folder in which a page's commands are run, cut down to seconds."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import stable_diffusions
import unclips
from documents import ROOT
from filelock import FileLock
from PIL import Image
from runs import PATIENCE, free_port

# Commands that are not run as they stand, and why. {flag as documented: (flags in its place, reason)}; a "*" stands for
# any value.
REPLACED = {
    "--config=...": (["--config=configs/digits.py"], "an ellipsis"),
    "--workdir=...": (["--workdir=runs/elsewhere"], "an ellipsis"),
    "--workdir=/mnt/shared/cifar10": (["--workdir=runs/shared"], "a folder that is not here"),
    "--config.data.data_dir=/mnt/shared/tensorflow_datasets": ([], "a folder that is not here"),
    "--config.data.source=tfds": (["--config.data.source=digits"], "would download"),
    "--source=google/ddpm-cifar10-32": (["--source=a-diffusers-folder"], "would download; the folder is of an export"),
    "--features=inception": (["--features=digits"], "its weights would be downloaded"),
    "--topology=*": ([], "wants libtpu, and minutes; measures here in its place"),
    "--coordinator=host0:1234": (["--coordinator=127.0.0.1:PORT"], "no such host"),
    "--num_processes=2": (["--num_processes=1"], "tests/main/test_sampling.py has a job of two"),
    "--source=stable-diffusion-v1-5/stable-diffusion-v1-5": (["--source=stable-diffusion"], "would download"),
    "--source=stable-diffusion-v1-5/stable-diffusion-inpainting": (
        ["--source=stable-diffusion-inpainting"],
        "would download",
    ),
    **{f"--source={name}": ([f"--source={folder}"], "would download") for name, folder in unclips.HUB.items()},
    "--height=512": (["--height=64"], "seconds more"),
    "--width=768": (["--width=80"], "seconds more"),
    "--images=0-49999": (["--images=0-15", "--shard_size=4"], "hours"),
    "--num_images=*": (["--num_images=24"], "minutes to hours"),
    "--likelihood_images=*": (["--likelihood_images=2"], "minutes"),
}
# What every run gets that a command does not set itself: a network and a training of a second, on grey 8x8 pictures.
TINY = {
    "data.height": "8",
    "data.width": "8",
    "data.channels": "1",
    "data.flip": "False",
    "model.channels": "8",
    "model.num_groups": "4",
    "model.channel_multipliers": "(1,)",
    "model.num_res_blocks": "1",
    "model.attention_resolutions": "()",
    "model.middle_attention": "False",
    "model.dropout": "0.0",
    "text.width": "16",
    "text.num_layers": "1",
    "text.num_heads": "2",
    "clip.width": "16",
    "clip.num_layers": "1",
    "clip.num_heads": "2",
    "clip.projection": "16",
    "prior.width": "16",
    "prior.num_layers": "1",
    "prior.num_heads": "2",
    "embedding.token_width": "16",
    "autoencoder.level_channels": "(8,8)",
    "train.num_steps": "4",
    "train.batch_size": "8",
    "log.every_steps": "2",
    "log.sample_every_steps": "0",
    "log.sample_steps": "4",
    "checkpoint.every_steps": "4",
    "sample.num_images": "4",
    "sample.num_steps": "4",
    "sample.batch_size": "8",
}
# What a mode gets that a command does not set itself, for the same reason.
FEW = {
    "evaluate": ["--num_images=24", "--likelihood_images=2"],
    "neighbours": ["--num_images=4"],
    "sample": ["--num_steps=4"],
    "plan": ["--programs=sample"],
}
OF_A_CASCADE = ("configs/numbers_base.py", "configs/numbers_sr.py")  # whose sizes follow from each other
# Modes whose results no command after them needs.
LEAVES_NOTHING = (
    *("sample", "interpolate", "vary", "denoise", "inpaint", "progressive", "coarse_to_fine", "neighbours", "evaluate"),
    *("upscale", "variations", "blend", "text_difference"),
    *("prepare", "doctor", "plan", "report"),
)
FROM_NETWORK = ("cifar10", "celebahq256", "lsun")  # configs whose images would be downloaded: digits in their place


class Workspace:
    """A folder in which a page's commands find what they name."""

    def __init__(self, folder, forks, done, surroundings):
        self.folder, self.forks, self.done, self.surroundings = folder, forks, done, surroundings
        self.server, self.address = None, ""
        for name in ("main.py", "configs", "benchmarks"):
            (folder / name).symlink_to(ROOT / name)
        rng = np.random.default_rng(0)
        for name in ("path/to/pictures", "folder", "other"):
            (folder / name).mkdir(parents=True)
            for i in range(12):
                Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / name / f"{i}.png")
                (folder / name / f"{i}.txt").write_text(f"picture number {i}")
        for name in ("a", "b", "noisy", "photo", "small"):
            shutil.copy(folder / "other" / "0.png", folder / f"{name}.png")
        (folder / "prompts.txt").write_text("ten\nninety\n")
        hole = np.zeros((8, 8), np.uint8)
        hole[2:5] = 255
        Image.fromarray(hole).save(folder / "hole.png")
        np.savez(folder / "pictures.npz", image=rng.integers(0, 256, (12, 8, 8, 1), np.uint8))

    def main(self, words):
        """Runs a command line of main.py to its end, with the changes in the tables above.

        A command whose results no later command needs is run only once, even if several pages have it, and so is one
        that trains.
        """
        if re.match(r"--config=configs/\S+ --workdir=runs/", " ".join(words[2:])):
            config, workdir, *more = words[2:]
            self.trained([config, *more], workdir.removeprefix("--workdir="))
        else:
            self.run(words)

    def trained(self, flags, workdir):
        """A run by these flags, which is trained once for all pages: their pictures are the same."""
        kept = self.done / hashlib.sha256(" ".join(flags).encode()).hexdigest()
        with FileLock(f"{kept}.lock"):
            if not kept.exists():
                self.run(["python", "main.py", *flags, f"--workdir={workdir}"])
                shutil.copytree(self.folder / workdir, kept)
        if not (self.folder / workdir).exists():
            shutil.copytree(kept, self.folder / workdir)

    def run(self, words):
        count = 3 if words[1] == "-m" else 2
        if any(f"--mode={mode}" in words for mode in LEAVES_NOTHING) and not self.is_first(words):
            return
        flags, environment = self.adapted(words[count:])
        began = time.monotonic()
        status, output = self.forks.run([*words[:count], *flags], self.folder, environment)
        print(f"{time.monotonic() - began:5.1f} s  {' '.join(words[count:])}")
        assert status == 0, f"{' '.join([*words[:count], *flags])}\n{output}"

    def is_first(self, words):
        """Whether no page before had this very command."""
        name = self.done / hashlib.sha256(" ".join(words).encode()).hexdigest()
        try:
            name.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def serve(self, words):
        """Starts a server, which runs until `close`."""
        self.close()
        self.prepare(dict(word.partition("=")[::2] for word in words[2:])["--workdir"])
        command = [sys.executable, *words[1:], "--port=0"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | self.forks.environment | self.surroundings
        self.server = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, text=True)
        self.address = re.search(r"http://127.0.0.1:\d+", self.server.stdout.readline())[0]

    def curl(self, words):
        """A call of the server that was started last."""
        called = [word.replace("http://127.0.0.1:8000", self.address) for word in words]
        output = subprocess.run(called, capture_output=True, text=True, check=True).stdout
        assert json.loads(output.splitlines()[-1])["state"] == "done", output

    def close(self):
        if self.server:
            self.server.terminate()
            assert self.server.wait(PATIENCE) == 0
            self.server.stdout.close()

    def adapted(self, flags):
        """(the flags to run with, the environment)."""
        given = [new for flag in flags for new in _replaced(flag)]
        environment = dict(self.surroundings)
        if "--distributed" in given:  # what a pod, Slurm and the like would set
            environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "1"}
            environment["JAX_PROCESS_ID"] = "0"
        value = dict(flag.partition("=")[::2] for flag in given)
        names = set(value)
        mode = value.get("--mode", "train")
        config = value.get("--config", "")
        if any(name in config for name in FROM_NETWORK) and "--config.data.source" not in names:
            given.append("--config.data.source=digits")
        if "--init_from" in names:  # of a run of digits, which predicts v
            given.append("--config.diffusion.prediction=v")
        if config:
            own = ("data.height", "data.width") if config in OF_A_CASCADE else ()
            given += [
                f"--config.{name}={x}"
                for name, x in TINY.items()
                if f"--config.{name}" not in names and name not in own
            ]
        if not {"--generated", "--against"} <= names:  # two sets of images and no run: nothing is sampled
            unused = names | ({"--likelihood_images"} if "clip" in value.get("--workdir", "") else set())
            given += [flag for flag in FEW.get(mode, []) if flag.partition("=")[0] not in unused]
        if mode not in ("train", "import", "compose") and not config and "--workdir" in names:
            self.prepare(value["--workdir"])
        for workdir in filter(None, (value.get("--init_from", ""), *value.get("--stages", "").split(","))):
            self.prepare(workdir)
        if value.get("--source") in ("stable-diffusion", "model.safetensors"):
            self.stable_diffusion()
        if value.get("--source") == "stable-diffusion-inpainting":
            folder = self.folder / value["--source"]
            stable_diffusions.write_narrow(folder, self.folder / "inpainting.safetensors", in_channels=9)
        if value.get("--source") in unclips.HUB.values():
            unclips.write(self.folder / value["--source"])
        if value.get("--source") == "a-diffusers-folder" and not (self.folder / "a-diffusers-folder").exists():
            self.prepare("runs/digits")
            self.main(["python", "main.py", "--mode=export", "--workdir=runs/digits", "--out=a-diffusers-folder"])
        return given, environment

    def stable_diffusion(self):
        """A narrow Stable Diffusion for pictures of 64x64, as a folder and as a file, and the tokenizer of both."""
        if not (self.folder / "stable-diffusion").exists():
            stable_diffusions.write_narrow(self.folder / "stable-diffusion", self.folder / "model.safetensors")
            shutil.copytree(self.folder / "stable-diffusion" / "tokenizer", self.folder / "path/to/tokenizer")

    def prepare(self, workdir):
        """Trains a command's run if no earlier command did; `results` belongs to a command that needs no run."""
        if workdir == "results" or (self.folder / workdir).exists() or workdir == "runs/imported":
            return
        if workdir == "runs/sd15":
            self.stable_diffusion()
            self.main(["python", "main.py", "--mode=import", "--source=stable-diffusion", f"--workdir={workdir}"])
            return
        name = {"runs/classes": "digits_classes"}.get(workdir, workdir.removeprefix("runs/"))
        if not (ROOT / "configs" / f"{name}.py").exists():
            name = "digits"
        self.trained([f"--config=configs/{name}.py"], workdir)


def _replaced(flag):
    for documented, (flags, _) in REPLACED.items():
        name, _, value = documented.partition("=")
        if flag == documented or (value == "*" and flag.startswith(f"{name}=")):
            return [new.replace("PORT", str(free_port())) for new in flags]
    return [flag]
