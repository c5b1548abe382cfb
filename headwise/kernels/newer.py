"""Gluon's names that are others from triton 3.7 on."""

from __future__ import annotations

from triton.experimental.gluon import language as gl

thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # type: ignore[attr-defined]
