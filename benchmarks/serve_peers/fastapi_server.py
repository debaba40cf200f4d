"""Runs in `.peers/fastapi`: work goes to FastAPI's thread pool, under uvicorn with its C parts.

Predictions are typed, so that pydantic writes the JSON in Rust; tensors are read and written by orjson. Workers times
threads is the number of cores.

usage: fastapi_server.py PORT WORKERS
"""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio.to_thread
import uvicorn
from classify import LENGTH_HEADER, from_environment, read_infer, write_infer
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

THREADS = max(1, len(os.sched_getaffinity(0)) // int(sys.argv[2]))


class Question(BaseModel):
    image: str


class Answer(BaseModel):
    label: str = Field(alias="class")
    index: int
    confidence: float
    probabilities: list[float]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.classifier = from_environment()
    # By default 40 threads take turns on the cores, which costs FastAPI a fifth of its throughput here.
    anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
    yield


app = FastAPI(lifespan=lifespan)


@app.post("/predict")
def predict(question: Question) -> Answer:
    classifier = app.state.classifier
    row = classifier.decode(question.image)
    return Answer.model_validate(classifier.answer(classifier.infer(row[None])[0]))


@app.post("/v2/models/resnet20/infer")
async def infer(request: Request) -> Response:
    return await run_in_threadpool(answer, await request.body(), request.headers.get(LENGTH_HEADER))


def answer(body: bytes, length: str | None) -> Response:
    content, headers = write_infer(app.state.classifier.infer(read_infer(body, length)), binary=length is not None)
    return Response(content, headers=headers)


@app.get("/ready")
async def ready() -> bool:
    return True


if __name__ == "__main__":
    port, workers = map(int, sys.argv[1:])
    uvicorn.run(
        "fastapi_server:app",
        port=port,
        workers=workers,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )
