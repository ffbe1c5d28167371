"""Processes for the tests, forked from one that has imported everything: a test that needs ten of them waits for what they do."""
import multiprocessing, os, signal, sys, tempfile, time
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "kd_arbitrary.cli", "kd_arbitrary.all", "torch._dynamo", "torchvision", "seaborn",
                                "sklearn.datasets", "sklearn.model_selection", "torchmetrics.functional.classification"])


class Job:
    "A function at work in a process of its own; what it says goes to files. For the rest like `subprocess.Popen`."
    def __init__(self, function, *arguments, environ=()):
        self.folder = tempfile.TemporaryDirectory(prefix="said-")
        self.said = Path(self.folder.name)
        self.process = CONTEXT.Process(target=_begin, args=(self.said, dict(environ), function, arguments))
        self.process.start()

    @property
    def stdout(self) -> str: return (self.said / "1").read_text()

    @property
    def stderr(self) -> str: return (self.said / "2").read_text()

    @property
    def returncode(self) -> int | None: return self.process.exitcode

    def running(self) -> bool: return self.process.is_alive()

    def send(self, sign: int) -> None: os.kill(self.process.pid, sign)

    def wait(self, seconds: float | None = None) -> "Job":
        "Until it ends, or for so long; then it is killed."
        self.process.join(seconds)
        return self if not self.running() else self.killed()

    def killed(self) -> "Job":
        self.process.kill()
        self.process.join()
        return self

    def until(self, seen, seconds: float = 120) -> bool:
        "Wait for something to be seen, as long as the job runs; whether it was."
        end = time.monotonic() + seconds
        while not (there := seen()) and self.running() and time.monotonic() < end: time.sleep(0.01)
        return bool(there)


def _begin(said: Path, environ: dict, function, arguments) -> None:
    for number in (1, 2):
        file = os.open(said / str(number), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(environ)
    signal.signal(signal.SIGINT, signal.default_int_handler)          # which the workers of pytest-xdist ignore
    function(*arguments)


def command(*words) -> None:
    "`kd_distill` with these words, as `python -m kd_arbitrary.cli` does it."
    from kd_arbitrary import cli
    sys.argv = ["kd_distill", *map(str, words)]
    cli.distill_main()


def kd_distill(*words, **how) -> Job:
    "The command, to its end."
    return Job(command, *words, **how).wait()
