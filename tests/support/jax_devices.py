# SPDX-License-Identifier: MIT
"""Steps on two devices of a CPU, in a process of their own: JAX counts devices once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fusedadam.jax import adamw
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def check() -> None:
    """Compare with a step on one device."""
    jax.config.update("jax_num_cpu_devices", 2)
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    replicated, parts = (NamedSharding(mesh, PartitionSpec(*of)) for of in ([], ["devices"]))
    rng = np.random.default_rng(0)
    params, grads = ({"w": jnp.asarray(rng.standard_normal((6, 500)), "float32")} for _ in range(2))
    for max_grad_norm in (None, 1.0):
        optimizer = adamw(0.01, max_grad_norm=max_grad_norm)
        step = jax.jit(lambda p, s, g, o=optimizer: o.step(g, s, p), donate_argnums=(0, 1))
        expected = _arrays(optimizer.step(grads, optimizer.init(params), params))
        for sharding in (replicated, parts):
            of = {"w": sharding}
            # A copy on every device, which may be donated.
            on_devices = [jax.device_put(jax.tree.map(jnp.copy, t), of) for t in (grads, params)]
            state = jax.device_put(optimizer.init(params), replicated)
            state = state._replace(
                **{
                    name: jax.device_put(getattr(state, name), of)
                    for name in ("mu", "nu", "memory")
                }
            )
            before = _addresses(on_devices[1])
            result = step(on_devices[1], state, on_devices[0])
            assert _equal(_arrays(result), expected)
            if sharding is replicated:
                assert _addresses(result[0]) == before
    _check_shard_map(mesh, params, grads)


def _check_shard_map(mesh: Mesh, params: Any, grads: Any) -> None:
    """Parts that each device steps by itself, in place."""
    optimizer = adamw(0.01)
    state = optimizer.init(params)
    part = PartitionSpec("devices")
    parts = jax.tree.map(lambda leaf: part if leaf.ndim else PartitionSpec(), state)
    by_parts: Any = {"mesh": mesh, "in_specs": (part, parts, part), "out_specs": (part, parts)}
    if hasattr(jax, "shard_map"):
        shard_map: Any = jax.shard_map
    else:
        from jax.experimental.shard_map import shard_map

        by_parts["check_rep"] = False
    step = jax.jit(
        shard_map(lambda p, s, g: optimizer.step(g, s, p), **by_parts), donate_argnums=(0, 1)
    )
    expected = _arrays(optimizer.step(grads, state, params))
    own = jax.tree.map(lambda leaf, of: jax.device_put(leaf, NamedSharding(mesh, of)), state, parts)
    given = jax.device_put(jax.tree.map(jnp.copy, params), NamedSharding(mesh, part))
    before = _addresses(given)
    result = step(given, own, jax.device_put(grads, NamedSharding(mesh, part)))
    assert _equal(_arrays(result), expected)
    assert _addresses(result[0]) == before


def _arrays(result: Any) -> list[Any]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves((result[0], result[1].without_memory()))]


def _equal(a: list[Any], b: list[Any]) -> bool:
    return all(map(np.array_equal, a, b))


def _addresses(tree: Any) -> list[int]:
    return [
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
    ]
