"""A server on this machine that takes what ``wandb sync`` uploads, as far as W&B's client needs answers."""

import gzip
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PROJECT = {"id": "p", "name": "fedsparse", "entity": {"id": "e", "name": "me"}}


class Uploads:
    """What has arrived of one run: rows with the line at which each upload began, summaries, and the run's fields."""

    def __init__(self):
        self.rows, self.offsets, self.summaries, self.fields, self.axes = [], [], [], {}, []

    def stream(self, files):
        for name, part in files.items():
            if name == "wandb-history.jsonl":
                self.offsets.append(part["offset"])
                self.rows += map(json.loads, part["content"])
            if name == "wandb-summary.json":
                self.summaries.append(json.loads(part["content"][-1]))

    def answer(self, query, variables):
        if "upsertBucket" in query:
            self.fields |= {key: value for key, value in variables.items() if value}
            self.axes = json.loads(variables["config"])["_wandb"]["value"].get("m") or self.axes
            bucket = {"id": "b", "name": self.fields["name"], "sweepName": None, "project": PROJECT}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "historyLineCount" in query:
            return {"data": {"model": PROJECT | {"bucket": self.bucket() if self.rows else None}}}
        return {"errors": [{"message": "no such query here"}]}

    def bucket(self):
        tail = json.dumps([json.dumps(self.rows[-1])])
        lines = {"historyLineCount": len(self.rows), "eventsLineCount": 0, "logLineCount": 0}
        texts = {"historyTail": tail, "eventsTail": "[]", "summaryMetrics": json.dumps(self.summaries[-1])}
        fields = {"name": self.fields["name"], "config": self.fields["config"], "wandbConfig": '{"t": 1}'}
        return {"id": "b", **fields, **lines, **texts}


@contextmanager
def wandb_server():
    """Serve: (address, uploads)."""
    uploads = Uploads()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
            answer = {}
            if self.path == "/graphql":
                asked = json.loads(body)
                answer = uploads.answer(asked["query"], asked.get("variables") or {})
            elif self.path.endswith("/file_stream"):
                uploads.stream(json.loads(body).get("files") or {})
            text = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", uploads
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
