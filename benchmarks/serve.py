"""The playground with many simultaneous users: is every request answered or queued, and does memory stay constant?

    python benchmarks/serve.py runs/digits
    python benchmarks/serve.py runs/digits --users 20 --seconds 120

Starts the server on loopback. Every user sends requests repeatedly: most for samples, some to vary or inpaint a
picture, with a random seed, sampler and number of steps. One in ten disconnects while it waits or is computed; one in
twenty-five uploads something that is not a picture. The queue has fewer places than there are users: a refused user
retries after the stated time, at most ten seconds. A request is lost if it gets no response, or one without a message;
then the exit status is 1.
"""

import argparse
import collections
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import requests
from common import print_json
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SAMPLERS = ("dpmpp_2m", "ddim", "ddpm", "heun")


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return ("a.png", file.getvalue())


class User(threading.Thread):
    """Sends requests until the end; `outcomes` gets (outcome, seconds, seconds until the first line) of each."""

    def __init__(self, number, url, end, size):
        super().__init__()
        self.url, self.end, self.size = url, end, size
        self.chance, self.outcomes = random.Random(number), []

    def run(self):
        while time.monotonic() < self.end:
            began = time.monotonic()
            try:
                outcome, first, pause = self.ask(began)
            except (requests.RequestException, ValueError, KeyError) as error:
                outcome, first, pause = f"lost: {type(error).__name__}", None, 1.0
            self.outcomes.append((outcome, time.monotonic() - began, first))
            time.sleep(max(0.0, min(pause, self.end - time.monotonic())))

    def ask(self, began):
        """A request's outcome, the seconds until its first line, and the seconds to pause after it."""
        path, files = self.request()
        with requests.post(f"{self.url}/api/{path}", files=files, stream=True, timeout=60) as response:
            first = time.monotonic() - began
            if response.status_code != 200:
                said = response.json()["error"]
                if response.status_code == 503:
                    return "refused: the queue is full", first, min(10, int(response.headers["retry-after"]))
                return (f"refused: {said[:40]}" if response.status_code == 400 else "lost"), first, 0.1
            leaves = self.chance.choices(("", "waiting", "running"), (18, 1, 1))[0]
            for line in response.iter_lines():
                event = json.loads(line)
                first = min(first, time.monotonic() - began)
                if event["state"] == "failed":
                    return f"failed: {event['error'][:40]}", first, 0.1
                if event["state"] == "done":
                    return "answered", first, self.chance.random()
                if event["state"] == leaves:
                    return "hung up", first, 0.1
        return "lost: broken off", first, 1.0

    def request(self):
        chance = self.chance
        fields = {
            "seed": str(chance.randrange(1000)),
            "num_images": str(chance.randint(1, 8)),
            "num_steps": str(chance.choice((10, 20, 50))),
            "sampler": chance.choice(SAMPLERS),
        }
        files = {name: (None, value) for name, value in fields.items()}
        path = chance.choice(("sample", "sample", "sample", "vary", "inpaint"))
        if path == "sample":
            return path, files
        pixels = np.frombuffer(chance.randbytes(self.size**2), np.uint8).reshape(self.size, self.size)
        files["picture"] = ("a.png", b"no picture") if chance.random() < 0.1 else png(pixels)
        if path == "inpaint":
            files["mask"] = png(np.uint8(255) * (np.indices(pixels.shape)[0] < self.size // 2))
        return path, files


def resident(process):
    """MiB of memory that the process uses; 0 if the system does not tell."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0.0
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def main(options):
    command = [sys.executable, "main.py", "--mode=serve", f"--workdir={options.run}", "--port=0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, f"--queue={options.queue}"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    url = re.search(r"http://\S+", process.stdout.readline())[0]
    size = requests.get(f"{url}/api/run", timeout=60).json()["height"]
    memory = [resident(process)]
    end = time.monotonic() + options.seconds
    users = [User(number, url, end, size) for number in range(options.users)]
    for user in users:
        user.start()
    while any(user.is_alive() for user in users):
        time.sleep(1)
        memory.append(resident(process))
    alive = process.poll() is None
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    outcomes = [outcome for user in users for outcome in user.outcomes]
    report(options, outcomes, memory, alive and process.returncode == 0 and said.endswith("has ended\n"))


def report(options, outcomes, memory, ended_well):
    counts = collections.Counter(outcome for outcome, _, _ in outcomes)
    lost = sum(count for outcome, count in counts.items() if outcome.startswith(("lost", "failed")))
    print(f"serve: {options.users} users for {options.seconds} s, {options.queue} places in the queue")
    for outcome, count in counts.most_common():
        seconds = [s for found, s, _ in outcomes if found == outcome]
        times = f"median {statistics.median(seconds):6.2f} s, longest {max(seconds):6.2f} s"
        print(f"{count:6}  {outcome:44}  {times}")
    words = [first for _, _, first in outcomes if first is not None]
    print(
        f"first word (place in the queue, or refusal): median {statistics.median(words):.3f} s, max {max(words):.3f} s"
    )
    # Compiled programs take memory too, most of it in the first half.
    begin, half, last = memory[0], memory[len(memory) // 2], memory[-1]
    print(
        f"MiB of memory: {begin:.0f} at the start, {half:.0f} at half, {max(memory):.0f} at most, {last:.0f} at the end"
    )
    answered = [s for found, s, _ in outcomes if found == "answered"]
    print_json(
        "serve",
        users=options.users,
        seconds=options.seconds,
        requests=len(outcomes),
        answered=len(answered),
        refused=sum(count for outcome, count in counts.items() if outcome.startswith("refused")),
        hung_up=counts["hung up"],
        lost=lost,
        latency_median=round(statistics.median(answered), 2),
        latency_max=round(max(answered), 2),
        first_word_max=round(max(words), 3),
        memory_mib=[round(value) for value in (begin, half, max(memory), last)],
        ended_well=ended_well,
    )
    if lost or not ended_well:
        sys.exit(1)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("run", help="a workdir")
    arguments.add_argument("--users", type=int, default=20)
    arguments.add_argument("--seconds", type=int, default=120)
    arguments.add_argument("--queue", type=int, default=16)
    main(arguments.parse_args())
