"""The jobs at work in a graph, by id."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from ..errors import AlreadyExists, NotFound

if TYPE_CHECKING:
    from ..graph.graph import Graph
    from .job import Job

__all__ = ["JobRegistry"]


class JobRegistry:
    """A view of ``graph.jobs``: it holds nothing itself, so that one can be made wherever it is needed.

    Guarded by the graph lock.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def add(self, job: Job) -> None:
        """From now on ``job`` can be found by its id, until it is dismissed.

        :raises AlreadyExists: another job has the id
        """
        with self._graph.lock:
            if job.id in self._graph.jobs:
                raise AlreadyExists(f"job ID {job.id!r} already in use")
            self._graph.jobs[job.id] = job
            job._registry = self

    def find(self, id: str) -> Job:
        """:raises NotFound: there is none"""
        with self._graph.lock:
            job = self._graph.jobs.get(id)
        if job is None:
            raise NotFound(f"job {id!r} not found")
        return cast("Job", job)

    def all(self) -> list[Job]:
        """Oldest first."""
        with self._graph.lock:
            return cast("list[Job]", list(self._graph.jobs.values()))

    def forget(self, job: Job) -> None:
        """Called by a job that was dismissed."""
        with self._graph.lock:
            if self._graph.jobs.get(job.id) is job:
                del self._graph.jobs[job.id]
