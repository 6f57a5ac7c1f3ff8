"""Serve the page of runs that train, on this machine's loopback address alone."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from shared.errors import ConfigurationError, SparseGKDError
from student_trainer.reporting.content import Report
from student_trainer.reporting.files import Files
from student_trainer.reporting.page import body, document, head
from student_trainer.reporting.runs import Found, TrainingRun, find_runs_so_far

HOST = "127.0.0.1"  # there is no flag for another: whoever can connect reads prompts and texts
_QUIET = 120  # seconds without a log after which a run may have stopped

# Fetches the sections every few seconds and replaces those that have changed, so that nothing
# flickers, and neither the scroll position nor an open token is lost.
_SCRIPT = """
const note=t=>{let p=document.getElementById('lost');
if(!p&&t){p=document.createElement('p');p.id='lost';p.className='status';
document.querySelector('main').prepend(p)}
if(p){p.textContent=t;p.hidden=!t}};
let tag='';
async function refresh(){
try{const headers=tag?{'If-None-Match':tag}:{};
const r=await fetch('/content'+location.search,{cache:'no-store',headers});
if(r.status==200){tag=r.headers.get('ETag')||'';
const main=document.querySelector('main');
const next=new DOMParser().parseFromString(await r.text(),'text/html').body;
const old=new Map([...main.querySelectorAll(':scope>section')].map(e=>[e.id,e]));
let last=null;
for(const s of [...next.children]){const o=old.get(s.id);old.delete(s.id);
if(o&&o.isEqualNode(s)){last=o;continue}
if(o)o.replaceWith(s);else if(last)last.after(s);else main.prepend(s);
last=s}
for(const o of old.values())o.remove()}
note(r.status<400?'':'The watcher cannot read the run ('+r.status+'). It tries again.')}
catch(e){note('The watcher has ended: this page no longer refreshes.')}
setTimeout(refresh,document.hidden?15000:3000)}
refresh();
"""
_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
_POLICY = (
    f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class LivePage:
    """The page of runs as they are now. What has not changed is neither read nor drawn again.

    Args:
        folders: of the runs.
        report_of: makes the content of the page.
    """

    def __init__(self, folders: Sequence[Path], report_of: Callable[[Found], Report]) -> None:
        self._folders, self._report_of = folders, report_of
        self._files = Files()
        self._lock = threading.Lock()  # each tab is answered by a thread of its own
        self._state: object = None
        self._report: Report | None = None
        self._body = ""

    def read(self) -> tuple[str, str]:
        """Return the title and the sections.

        Raises:
            DatasetError: a file that cannot be read, as while it is being written.
        """
        with self._lock:
            found, missing = find_runs_so_far(self._folders, self._files)
            runs = [(run.name, run.logged, len(run.history)) for run in found.training]
            state = (self._files.reads, runs, [one.name for one in found.evaluations], missing)
            if self._report is None or state != self._state:
                self._report = self._report_of(found)
                self._body = body(self._report)
                self._state = state
            status = " ".join(status_lines(found, missing, time.time()))
            return self._report.title, head(replace(self._report, status=status)) + self._body


def watch(page: LivePage, port: int | None) -> None:
    """Serve the page as it is at each request, until Ctrl-C.

    Its address holds a random token, without which nothing is answered: other users of this machine
    can connect too.

    Raises:
        ConfigurationError: the port is taken or is none.
    """
    token = secrets.token_urlsafe(24)
    try:
        server = _Server((HOST, port or 0), _handler(page, token))
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"--port {port}: {error}; give another, or leave it out for one that is free"
        ) from error
    with server:
        address = f"http://{HOST}:{server.server_port}/?token={token}"
        sys.stdout.write(f"watching at {address} (Ctrl-C ends it)\n")
        sys.stdout.flush()
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            sys.stdout.write("\n")


def status_lines(found: Found, missing: Sequence[Path], now: float) -> list[str]:
    """Return a sentence for each run: it has not begun, trains, may have stopped or has ended.

    Args:
        missing: folders in which nothing has begun.
        now: in seconds since 1970.
    """
    trains = [run for run in found.training if not run.seeds]
    lines = [f"{folder}: no step is logged yet; waiting." for folder in missing]
    return [*lines, *(_status(run, now) for run in trains)]


def _status(run: TrainingRun, now: float) -> str:
    step = f"{run.history[-1]['step']:g}" if run.history else "0"
    of = f" of {run.max_steps}" if run.max_steps else ""
    if run.logged is None:
        return f"{run.name}: ended after step {step}{of}."
    quiet = now - run.logged
    if quiet > _QUIET:
        since = f"{quiet / 60:.0f} minutes" if quiet < 7200 else f"{quiet / 3600:.0f} hours"
        return (
            f"{run.name}: step {step}{of}; nothing was logged for {since}, so it may have stopped."
        )
    clock = time.strftime("%H:%M:%S", time.localtime(run.logged))
    return f"{run.name}: training, step {step}{of}, logged at {clock}."


class _Server(ThreadingHTTPServer):
    """A server that says nothing of a browser which goes away before it has its answer."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _handler(page: LivePage, token: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """A handler of two addresses: the page, and its sections alone."""

        server_version, sys_version = "student-trainer", ""
        timeout = 30  # of an idle connection, seconds

        def do_GET(self) -> None:
            port = self.connection.getsockname()[1]
            address = urlsplit(self.path)
            given = parse_qs(address.query).get("token", [""])[0]
            foreign = self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}")
            # A foreign name that resolves to this machine is another site's attempt to read.
            if foreign or not hmac.compare_digest(given.encode(), token.encode()):
                self._answer(403, "text/plain", "open the address that the command printed\n")
            elif address.path not in ("/", "/content"):
                self._answer(404, "text/plain", "there is one page, at /\n")
            else:
                self._page(whole=address.path == "/")

        def _page(self, *, whole: bool) -> None:
            try:
                title, sections = page.read()
            except (SparseGKDError, OSError, KeyError) as error:  # a file that is half written
                self._answer(503, "text/plain", f"{error}\n")
                return
            tag = f'"{hashlib.sha256(sections.encode()).hexdigest()[:32]}"'
            if whole:
                self._answer(200, "text/html", document(title, sections, script=_SCRIPT))
            elif self.headers.get("If-None-Match") == tag:
                self._answer(304, "text/html", "", tag)
            else:
                self._answer(200, "text/html", sections, tag)

        def _answer(self, status: int, kind: str, text: str, tag: str | None = None) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Content-Security-Policy", _POLICY)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Referrer-Policy", "no-referrer")
            if tag:
                self.send_header("ETag", tag)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Write nothing: a refresh every three seconds is no news."""

    return Handler
