"""Black boxes as they are in life: a server that fails in ten ways, kills, budgets that end."""
import io, json, sqlite3, threading, time, warnings
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from kd_arbitrary.pictures.sources import make_source
from kd_arbitrary.teachers.adapters import load_teacher
from kd_arbitrary.teachers.black_box import BudgetError, behind_ledger, labels_only, walled
from kd_arbitrary.teachers.teacher import Teacher
from kd_arbitrary.transfer.active import active  # noqa: F401, it enters the strategies
from kd_arbitrary.transfer.balance import balance
from processes import Job, command, kd_distill

SHAPE, CLASSES = (1, 12, 12), 4
WEIGHTS = torch.randn(144, CLASSES, generator=torch.Generator().manual_seed(0)).numpy()


def labels_of(x): return (x.reshape(len(x), -1) - 0.5) @ WEIGHTS


DESCRIBED = 200, {}, json.dumps(dict(input_shape=SHAPE, classes=list("abcd"))).encode()


@contextmanager
def server(behave, about=DESCRIBED):
    "A service whose answer is `behave(images, number of the question) -> (status, headers, body)`; counts what it is sent."
    seen = dict(images=0, calls=0)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): pass

        def send(self, status, headers, body):
            self.send_response(status)
            for k, v in {"Content-Length": str(len(body)), **headers}.items(): self.send_header(k, v)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self): self.send(*about)

        def do_POST(self):
            images = np.load(io.BytesIO(self.rfile.read(int(self.headers["Content-Length"]))))
            seen["images"] += len(images)
            seen["calls"] += 1
            told = behave(images, seen["calls"])
            if told is None: return self.connection.close()
            self.send(*told)
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{web.server_address[1]}/", seen
    finally: web.shutdown(), web.server_close()


def good(x): return 200, {}, json.dumps(dict(labels=labels_of(x).argmax(1).tolist())).encode()


def told(**answer): return 200, {}, json.dumps(answer).encode()


def shares(x): return torch.from_numpy(labels_of(x)).softmax(1)


def load(url, tmp_path, budget=400, **options):
    return load_teacher(url, wall=walled(tmp_path / "answers.sqlite", budget, sleep=lambda s: None, **options))


def asked(tmp_path):
    return sqlite3.connect(tmp_path / "answers.sqlite").execute("SELECT SUM(images) FROM paid").fetchone()[0]


IMAGES = make_source("uniform", SHAPE).draw(200, torch.Generator().manual_seed(1))
LYING = {  # what a service may answer in place of an answer, and what is said of it
    "wrong count": (lambda x: told(labels=[0] * (len(x) - 1)), r"gave \[63\] for 64 images"),
    "wrong shape": (lambda x: told(labels=[[[0]]] * len(x)), r"gave \[64, 1, 1\] for 64 images"),
    "another number of classes": (lambda x: told(labels=[7] * len(x)), "integers from 0 to 3"),
    "labels between": (lambda x: told(labels=[1.7] * len(x)), r"labels that are no whole numbers, \[1.7"),
    "ragged": (lambda x: told(logits=[[0.0] * (1 + i % 3) for i in range(len(x))]), "no table of numbers"),
    "HTML": (lambda x: (200, {}, b"<html>Sign in</html>"), "did not answer with JSON but with b'<html>"),
    "an empty object": (lambda x: told(), "answered with nothing"),
    "NaN": (lambda x: (200, {}, b'{"logits": [' + b",".join([b"[NaN, 0, 0, 0]"] * len(x)) + b"]}"), "NaN or infinity"),
    "refused": (lambda x: (403, {}, b"no such key"), "refused with status 403: no such key"),
}


@pytest.mark.parametrize("name", LYING)
def test_what_is_no_answer_is_an_error_and_is_not_kept(name, tmp_path):
    lie, words = LYING[name]
    with server(lambda x, n: lie(x) if n == 2 else good(x)) as (url, seen):
        teacher = load(url, tmp_path)
        with pytest.raises(ValueError, match=words): teacher(IMAGES)
        assert load(url, tmp_path)(IMAGES).argmax(1).tolist() == labels_of(IMAGES.numpy() / np.float32(255)).argmax(1).tolist()
        assert seen["images"] == asked(tmp_path) == 2 + 200 + 64                      # the lie was paid for, and asked again


def test_probabilities_that_do_not_sum_to_one(tmp_path):
    right = lambda x: told(probabilities=shares(x).tolist())
    with server(lambda x, n: told(probabilities=(shares(x) * 1.3).tolist()) if n == 2 else right(x)) as (url, seen):
        teacher = load(url, tmp_path)
        with pytest.raises(ValueError, match=r"row \d+ of its answer, .* sums to 1.3"): teacher(IMAGES)
        assert teacher.gives == "probabilities" and load(url, tmp_path)(IMAGES).shape == (200, 4)
    with server(lambda x, n: told(probabilities=(shares(x) * 1.3).tolist()) if n == 1 else right(x)) as (url, _):
        with pytest.raises(ValueError, match="sums to 1.3"): load(url, tmp_path)      # already the first answer, which is not kept
        assert load(url, tmp_path).gives == "probabilities"


def test_rounded_probabilities_are_kept_as_they_came_and_divided_by_their_sum(tmp_path):
    hundredths = lambda x: shares(x / 4).numpy().round(2)
    with server(lambda x, n: told(probabilities=hundredths(x).tolist())) as (url, seen):
        came = hundredths(IMAGES.numpy() / np.float32(255))
        assert (abs(came.sum(1) - 1) > 5e-3).any()
        for _ in range(2):                                                            # the second time from the ledger
            assert np.allclose(load(url, tmp_path)(IMAGES), came / came.sum(1, keepdims=True), atol=1e-6)
        assert seen["images"] == asked(tmp_path) == 202


@pytest.mark.parametrize("status", [404, 405, 501, 503, 403])
def test_a_service_without_a_description_is_a_teacher_once_it_is_described(status, tmp_path):
    words = {503: "answered 503; try again later", 403: "refused with status 403: closed; a key is sent if KD_ARBITRARY_HEADERS .*; try again"}.get(status, "not written in it")
    with server(lambda x, n: good(x), (status, {}, b"closed")) as (url, seen):
        with pytest.raises(ValueError, match=words): load_teacher(url)
        assert seen["images"] == 0
        assert load_teacher(url, input_shape=SHAPE, classes=CLASSES)(IMAGES).shape == (200, 4)


def test_names_of_classes_become_text(tmp_path):
    with server(lambda x, n: good(x), (200, {}, json.dumps(dict(input_shape=SHAPE, classes=[0, 1, 2, 3])).encode())) as (url, _):
        assert load_teacher(url).classes == tuple("0123")


TROUBLE = {  # what a service may do for a while
    "429": lambda x: (429, {"Retry-After": "3"}, b""), "500": lambda x: (500, {}, b"oops"), "503": lambda x: (503, {}, b""),
    "cut connection": lambda x: None, "half an answer": lambda x: (200, {"Content-Length": "5000"}, b'{"labels": ['),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_that_passes_is_met_with_patience_and_counted(name, tmp_path):
    waits = []
    with server(lambda x, n: TROUBLE[name](x) if n in (2, 3) else good(x)) as (url, seen):
        behind = walled(tmp_path / "answers.sqlite", 400, sleep=waits.append)
        ask = load_teacher(url, wall=behind)
        assert ask(IMAGES).shape == (200, 4)
        assert seen["images"] == asked(tmp_path) == 2 + 200 + 2 * 64
    assert len(waits) == 2 and (waits == [3.0, 3.0] if name == "429" else 0.5 <= waits[0] <= 0.75 < 1.0 <= waits[1] <= 1.5)


def test_changing_answers_are_noticed(tmp_path):
    other = lambda x, n: told(labels=np.random.default_rng(n).integers(0, 4, len(x)).tolist())
    with server(other) as (url, seen):
        teacher = load(url, tmp_path, recheck=0.1)
        with pytest.raises(ValueError, match="changed its answers: .* questions asked again were answered differently"): teacher(IMAGES)
        assert seen["images"] == asked(tmp_path)


def test_a_set_is_made_of_what_a_budget_allows(tmp_path):
    with server(lambda x, n: (500, {}, b"") if n % 3 == 0 else good(x)) as (url, seen):
        teacher = load(url, tmp_path, budget=300)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ts, report = balance(make_source("uniform", SHAPE), teacher, 298, "active", empty="keep", show=False)
        assert "the budget of 300 questions is spent" in str(caught[0].message)
        assert seen["images"] == asked(tmp_path) <= 300 and 150 < len(ts) < 298 == report.n
        again, _ = balance(make_source("uniform", SHAPE), load(url, tmp_path, budget=300), 298, "active", empty="keep", show=False)
        assert torch.equal(again.images, ts.images) and seen["images"] <= 300          # from the ledger
        with pytest.raises(BudgetError, match="300 were asked"): teacher(IMAGES)


def test_labels_alone_of_a_teacher_with_a_budget_are_kept_to_it(tmp_path):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, CLASSES))
    shy = labels_only(behind_ledger(Teacher(net, CLASSES, SHAPE), tmp_path / "shy.sqlite", budget=30))
    with pytest.warns(UserWarning, match="the set is made of the answers there are"):
        assert len(balance(make_source("uniform", SHAPE), shy, 100, "none", show=False)[0]) == 30
    assert shy.box.ledger.paid == 30


def test_nothing_is_asked_once_the_budget_is_spent(tmp_path):
    with server(lambda x, n: good(x)) as (url, seen):
        for _ in range(3):
            with pytest.raises(BudgetError): load(url, tmp_path, budget=50)(IMAGES)
        assert seen["images"] == 50                                                   # three starts, and not one image more


def test_the_command_line_through_kills(tmp_path):
    "A slow and failing service, a job that is killed again and again, and a budget."
    def behave(x, n):
        time.sleep(0.05)
        return (500, {}, b"") if n % 5 == 0 else None if n % 7 == 0 else good(x)
    with server(behave) as (url, seen):
        words = ["--teacher", url, "--budget", "600", "--balance", "active", "--student", "wrn16_1",
                 "--epochs", "1", "--quiet", "--json", "--out", str(tmp_path / "run"), "--ledger", str(tmp_path / "answers.sqlite")]
        for calls in (3, 6):
            until = seen["calls"] + calls
            job = Job(command, *words)
            assert job.until(lambda: seen["calls"] >= until)
            job.killed()
        done = kd_distill(*words)
        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout)
        assert seen["images"] <= asked(tmp_path) <= 600 and record["paid"] <= 600 and record["job"]["recheck"] == 0.01
        assert 250 < sum(record["report"]["seen"]) < 600 and "the budget of 600 questions is spent" in done.stderr
