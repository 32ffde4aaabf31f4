"""The reference cache: what packing costs, and that no flip, kill, race or full disk ever yields a wrong row."""

import errno
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import pgdpo_fast as pf
from pgdpo_fast import storage
from pgdpo_fast.diffusion import DDPM, FlowMatching
from pgdpo_fast.errors import DataError, NonFiniteError, Preempted
from pgdpo_fast.reference.build import build_cache
from pgdpo_fast.reference.cache import Block, Layout, ReferenceCache
from pgdpo_fast.reference.fingerprint import check_equal
from pgdpo_fast.reference.rows import FORMATS, gather, pack
from pgdpo_fast.reference.stream import RowStream

SHAPE = (4, 3, 6, 7)
BLOCKS = [Block(tuple(f"pair-{i}" for i in range(7)), 3), Block(("held-a", "held-b"), 2)]
KEYS = [(id, draw) for block in BLOCKS for draw in range(block.draws) for id in block.ids]
FINGERPRINT = {"model.weights": "ab" * 32, "process": "FlowMatching(shift=3.0)", "training.seed": 0}


def layout(format="fp8", granularity="sample", shard_bytes=4000):
    return Layout.of(format, granularity, SHAPE, "fp32", 2, shard_bytes)


def predictions(keys):
    """A stand-in for the reference: what it says of a (pair, draw) depends on nothing else."""

    def one(side, id, draw):
        return torch.randn(SHAPE, generator=torch.Generator().manual_seed(hash_of(side, id, draw)))

    return torch.stack([one(side, *key) for side in ("chosen", "rejected") for key in keys])


def hash_of(*parts):
    return int(storage.sha256_bytes(repr(parts).encode())[:8], 16)


def compute_rows(keys, format="fp8", granularity="sample"):
    prediction = predictions(keys)
    return pack(prediction, torch.zeros_like(prediction), format, granularity)


def make(path, format="fp8", granularity="sample", compute=None, **options):
    return build_cache(
        path,
        fingerprint=FINGERPRINT,
        blocks=BLOCKS,
        layout=layout(format, granularity),
        compute=compute or (lambda keys: compute_rows(keys, format, granularity)),
        **options,
    )


def assert_every_row_is_right(cache):
    rows, right = cache.rows(KEYS), compute_rows(KEYS, cache.layout.format, cache.layout.granularity)
    assert rows.keys() == right.keys()
    assert all(torch.equal(rows[name], right[name]) for name in right)


# -- packing


def realistic_batch(pairs=4, drift=0.01, seed=0, shape=(16, 3, 60, 104)):
    """Policy, reference and target of a trained network: residuals of rms 0.3 that vary fourfold over the video with
    heavy tails, and a policy `drift` away from the reference."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    target = normal(2 * pairs, *shape)
    size = 0.3 * torch.exp(0.5 * normal(2 * pairs, 1, *shape[1:]))
    reference = target + size * normal(2 * pairs, *shape)
    policy = reference + drift * size * normal(2 * pairs, *shape)
    return policy.requires_grad_(), target, reference


def loss_and_gradient(policy, target, reference, objective, granularity):
    out = pf.preference_loss(policy, target, reference, objective=objective, granularity=granularity)
    return out.loss.item(), torch.autograd.grad(out.loss, policy)[0].double().flatten()


@pytest.mark.parametrize("granularity", ["sample", "frame"])
@pytest.mark.parametrize("objective", [pf.DPO(beta=100.0), pf.DPO(beta=5000.0), pf.PGDPO(beta=100.0)], ids=repr)
def test_fp8_rows_barely_move_loss_and_gradient(objective, granularity):
    policy, target, reference = realistic_batch()
    loss, gradient = loss_and_gradient(policy, target, reference, objective, granularity)
    packed = pf.PackedReference.pack(reference, target, "fp8")
    packed_loss, packed_gradient = loss_and_gradient(policy, target, packed, objective, granularity)
    assert abs(packed_loss - loss) <= 1e-3 * abs(loss)
    assert F.cosine_similarity(gradient, packed_gradient, dim=0) >= 0.9999


def test_fp8_keeps_the_error_of_a_video_and_bf16_does_not():
    _, target, reference = realistic_batch()
    exact = pf.reference_errors(reference, target).chosen
    deviation = {}
    for format in ("bf16", "fp8"):
        packed = pf.PackedReference.pack(reference, target, format)
        kept = pf.preference_loss(reference, target, packed, objective=pf.DPO(beta=1.0)).reference_chosen_error
        deviation[format] = float(((kept - exact) / exact).abs().max())
    assert deviation["fp8"] < 1e-6 < deviation["bf16"] < 1e-4


def unpacked(packed):
    """Residuals of the chosen half, as the kernels read them."""
    rows = packed.chosen.flatten(1).view(torch.float8_e4m3fn).float()
    return (rows * packed.chosen_scale.repeat_interleave(128, 1)[:, : rows.shape[1]]).view(packed.chosen.shape)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-20, 1e-36, 1e-44, 1e30])
def test_fp8_round_trip_is_within_a_sixteenth_at_any_scale(size):
    residual = size * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    packed = pf.PackedReference.pack(residual, torch.zeros_like(residual), "fp8")
    found, largest = unpacked(packed), residual[:1].abs().max()
    assert torch.isfinite(found).all() and torch.isfinite(packed.chosen_scale).all()
    # half a step of a 4-bit significand, the change of scale on top; below 2^-6 of the block's largest, absolute steps
    assert ((found - residual[:1]).abs() <= residual[:1].abs() * 0.075 + largest * 2.0**-17 + 2.0**-140).all()


def test_fp8_of_blocks_of_zeros_of_one_spike_and_of_a_short_last_block():
    residual = torch.zeros(2, *SHAPE)
    residual[0].view(-1)[130] = -3.0  # second block; the last one of 504 elements has 120
    packed = pf.PackedReference.pack(residual, torch.zeros_like(residual), "fp8")
    assert packed.chosen_scale.shape == (1, 4) and torch.isfinite(packed.chosen_scale).all()
    assert torch.equal(unpacked(packed)[0] != 0, residual[0] != 0)
    assert unpacked(packed)[0].view(-1)[130] == pytest.approx(-3.0, rel=1e-6)


def test_fp8_never_makes_a_nan_of_a_large_value():
    residual = torch.randn(2, *SHAPE).sign() * 448.0001 * 7
    packed = pf.PackedReference.pack(residual, torch.zeros_like(residual), "fp8")
    torch.testing.assert_close(unpacked(packed), residual[:1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("format", FORMATS)
def test_a_prediction_that_is_not_finite_is_an_error_naming_the_pair(tmp_path, format, value):
    def compute(keys):
        prediction = predictions(keys)
        if ("pair-3", 1) in keys:
            prediction[keys.index(("pair-3", 1)), 0, 0, 0, 0] = value
        return pack(prediction, torch.zeros_like(prediction), format)

    with pytest.raises(NonFiniteError, match=r"pair-3 \(draw 1\)"):
        make(tmp_path / "cache", format, compute=compute)
    assert_every_row_is_right(make(tmp_path / "cache", format))


@pytest.mark.parametrize(
    "process",
    [FlowMatching(shift=3.0), DDPM(), DDPM(prediction="v", zero_terminal_snr=True)],
    ids=["flow", "epsilon", "v"],
)
@pytest.mark.parametrize("format", FORMATS)
def test_a_target_built_in_the_kernels_packs_like_the_target_itself(process, format):
    clean, noise = torch.randn(4, *SHAPE), torch.randn(2, *SHAPE)
    t = process.timestep(torch.tensor([0.2, 0.9999], dtype=torch.float64))
    prediction, both = torch.randn(4, *SHAPE), torch.cat([t, t])
    built = pf.NoisedTarget(clean, noise, *process.target_coefficients(t))
    rows, plain = (pack(prediction, y, format) for y in (built, process.target(clean, torch.cat([noise, noise]), both)))
    for name in plain:  # the kernels of the errors may fuse a multiplication into an addition
        torch.testing.assert_close(rows[name], plain[name], rtol=1e-6 if format == "errors" else 0, atol=0)


# -- rows on disk


def named(reference):
    """What the loss gets, as rows."""
    return {"chosen": reference[0], "rejected": reference[1]} if isinstance(reference, tuple) else vars(reference)


@pytest.mark.parametrize(
    "format, granularity",
    [("errors", "sample"), ("errors", "frame"), ("predictions", "any"), ("bf16", "any"), ("fp8", "any")],
)
def test_rows_come_back_as_they_were_made_in_any_order(tmp_path, format, granularity):
    cache = make(tmp_path / "cache", format, granularity)
    assert_every_row_is_right(cache)
    keys = random.Random(0).sample(KEYS, 9)
    right = compute_rows(keys, format, granularity)
    for found in (cache.rows(keys), pickle.loads(pickle.dumps(cache)).rows(keys), named(cache.get(keys))):
        assert all(torch.equal(found[name], right[name]) for name in right)
    assert len(cache) == len(KEYS) and ("pair-6", 2) in cache and ("pair-6", 3) not in cache


def test_the_loss_takes_rows_as_they_are(tmp_path):
    policy = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target, keys = torch.zeros(4, *SHAPE), [("pair-2", 1), ("held-a", 0)]
    online = pf.preference_loss(policy, target, predictions(keys), objective=pf.PGDPO())
    references = [make(tmp_path / format, format).get(keys) for format in FORMATS]
    kinds = (pf.ReferenceErrors, tuple, pf.PackedReference, pf.PackedReference)
    assert tuple(map(type, references)) == kinds
    for reference in (reference for reference, format in zip(references, FORMATS, strict=True) if format != "bf16"):
        out = pf.preference_loss(policy, target, reference, objective=pf.PGDPO())
        torch.testing.assert_close(out.loss, online.loss, rtol=1e-5, atol=0)


def test_gather_brings_rows_from_several_tables_into_given_buffers():
    tables = [{"chosen": torch.arange(6.0).view(3, 2)}, {"chosen": 10 + torch.arange(4.0).view(2, 2)}]
    out = {"chosen": torch.full((4, 2), -1.0)}
    rows = gather(tables, [(1, 1), (0, 0), (0, 2)], out)
    assert rows["chosen"].tolist() == [[12, 13], [0, 1], [4, 5]]
    assert rows["chosen"].data_ptr() == out["chosen"].data_ptr() and out["chosen"][3].tolist() == [-1, -1]


def test_a_row_the_cache_does_not_hold_is_an_error(tmp_path):
    cache = make(tmp_path / "cache")
    for key in [("pair-0", 3), ("pair-0", -1), ("held-a", 2), ("nobody", 0)]:
        with pytest.raises(DataError, match=key[0]):
            cache.rows([("pair-1", 0), key])


@pytest.mark.parametrize(
    "field, value", [("process", "DDPM()"), ("training.seed", 1), ("model.weights", "cd" * 32), ("another", True)]
)
def test_another_fingerprint_is_refused_with_field_values_and_remedy(tmp_path, field, value):
    cache, wanted = make(tmp_path / "cache"), {**FINGERPRINT, field: value}
    cache.require(FINGERPRINT, 3)
    shown = "cdcdcdcdcdcd..." if field == "model.weights" else repr(value)
    for attempt in (
        lambda: cache.require(wanted, 3),
        lambda: build_cache(
            tmp_path / "cache", fingerprint=wanted, blocks=BLOCKS, layout=layout(), compute=compute_rows
        ),
    ):
        with pytest.raises(DataError) as caught:
            attempt()
        message = str(caught.value)
        assert field in message and shown in message and "cache-reference" in message and "\n" not in message
        assert str(FINGERPRINT.get(field))[:12] in message
    assert_every_row_is_right(ReferenceCache(tmp_path / "cache"))


def test_fewer_draws_leave_a_larger_cache_as_it_is(tmp_path):
    large = make(tmp_path / "cache", "errors")
    before = {file.name: file.read_bytes() for file in (tmp_path / "cache").iterdir() if file.is_file()}
    fewer = [Block(block.ids, max(1, block.draws - 1)) for block in BLOCKS]
    assert fewer != list(BLOCKS)

    def nothing(keys):
        raise AssertionError("the reference ran again")

    small = build_cache(
        tmp_path / "cache", fingerprint=FINGERPRINT, blocks=fewer, layout=layout("errors"), compute=nothing
    )
    assert len(small) == len(large)
    after = {file.name: file.read_bytes() for file in (tmp_path / "cache").iterdir() if file.is_file()}
    assert after == before
    shard = next((tmp_path / "cache").glob("*.safetensors"))
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(DataError, match=shard.name):
        build_cache(tmp_path / "cache", fingerprint=FINGERPRINT, blocks=fewer, layout=layout("errors"), compute=nothing)


def test_more_draws_than_the_cache_holds_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds 3 draws per pair, this run visits 4"):
        make(tmp_path / "cache").require(FINGERPRINT, 4)


def test_every_bit_and_name_of_a_network_is_in_its_digest():
    def digests(change):
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.arange(parameter.numel()).view_as(parameter))
            change(model)
        return storage.weights_digest(model)

    def flip(model):
        model[0].weight.view(torch.int32)[2, 1] ^= 1

    changes = [
        lambda m: None,
        flip,
        lambda m: m.bfloat16(),
        lambda m: m[1].running_mean.add_(1),
        lambda m: m.add_module("last", torch.nn.Linear(1, 1, bias=False)),
    ]
    assert len({digests(change) for change in changes}) == len(changes)
    assert digests(changes[0]) == digests(lambda m: m.train(False))


@pytest.mark.parametrize("format", FORMATS)
def test_rows_read_ahead_are_the_rows_read_directly(tmp_path, format):
    cache = make(tmp_path / "cache", format)
    stream, order = RowStream(cache, pairs=3, depth=2), random.Random(1)
    batches = [order.sample(KEYS, 3) for _ in range(12)]
    for number, batch in enumerate(batches):
        for coming in batches[number : number + 4]:  # more than its depth
            stream.prefetch(coming)
        found, right = named(stream.take(batch)), compute_rows(batch, format)
        assert all(torch.equal(found[name], right[name]) for name in right)
    stream.close()


def test_damage_met_while_reading_ahead_reaches_the_reader(tmp_path):
    cache = make(tmp_path / "cache")
    stream = RowStream(cache, pairs=2)
    flip(cache.path / cache.shards[0].name, random.Random(0))
    stream.prefetch([("pair-0", 0)])
    with pytest.raises(DataError, match="damaged"):
        stream.take([("pair-0", 0)])


# -- faults


def flip(path, order):
    data = bytearray(path.read_bytes())
    data[order.randrange(len(data))] ^= 1 << order.randrange(8)
    path.write_bytes(data)


def truncate(path, order):
    os.truncate(path, order.randrange(path.stat().st_size))


def extend(path, order):
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize("format", FORMATS)
def test_every_flip_truncation_and_missing_file_is_found_before_a_row_is_used(tmp_path, format):
    cache, order = make(tmp_path / "cache", format), random.Random(format)
    files = [path for path in cache.path.iterdir() if path.name != ".lock"]
    assert {"cache.json", "index.json"} < {path.name for path in files}
    damages = [flip] * 80 + [truncate] * 30 + [extend] * len(files) + [lambda path, _: path.unlink()] * len(files)
    for number, damage in enumerate(damages):
        path = files[number % len(files)]
        whole = path.read_bytes()
        damage(path, order)
        with pytest.raises(DataError) as caught:
            found = ReferenceCache(cache.path)
            found.rows(KEYS)
        assert path.name in str(caught.value) or path.parent.name in str(caught.value)
        path.write_bytes(whole)
    assert_every_row_is_right(ReferenceCache(cache.path))


def test_damage_is_repaired_by_the_same_command_and_only_that_shard_is_computed(tmp_path):
    cache, order, computed = make(tmp_path / "cache"), random.Random(2), []
    flip(cache.path / cache.shards[2].name, order)
    (cache.path / cache.shards[4].name).unlink()

    def compute(keys):
        computed.extend(keys)
        return compute_rows(keys)

    assert_every_row_is_right(make(tmp_path / "cache", compute=compute))
    ranges = cache.layout.shards(BLOCKS)
    assert computed == [KEYS[i] for number in (2, 4) for i in ranges[number]]


def test_a_cache_without_its_json_is_rebuilt_from_its_shards(tmp_path):
    make(tmp_path / "cache")
    (tmp_path / "cache" / "cache.json").unlink()
    with pytest.raises(DataError, match="no reference cache"):
        ReferenceCache(tmp_path / "cache")
    assert_every_row_is_right(make(tmp_path / "cache", compute=lambda keys: pytest.fail("nothing was missing")))


def test_shards_of_another_cache_are_not_taken_over(tmp_path):
    make(tmp_path / "cache")
    (tmp_path / "cache" / "cache.json").unlink()
    computed = []

    def compute(keys):
        computed.extend(keys)
        return compute_rows(keys)

    build_cache(
        tmp_path / "cache", fingerprint={"model.weights": "other"}, blocks=BLOCKS, layout=layout(), compute=compute
    )
    assert computed == KEYS


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(DataError, match="precious.txt"):
        make(tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_sigterm_stops_between_two_forwards_and_the_same_call_goes_on(tmp_path):
    computed = []

    def compute(keys):
        computed.extend(keys)
        return compute_rows(keys)

    def terminate(done, total):
        if done == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="6 of .* rows.*resume with: do it again") as caught:
        make(tmp_path / "cache", compute=compute, progress=terminate, resume_command="do it again")
    assert caught.value.exit_code == 75 and len(computed) == 6
    with pytest.raises(DataError, match="not finished"):
        ReferenceCache(tmp_path / "cache")
    assert_every_row_is_right(make(tmp_path / "cache", compute=compute))
    assert computed == KEYS  # every row once


@pytest.mark.parametrize("fails_at", [0, 1, 2, 5, 9, 14, 20])
def test_a_disk_that_fills_up_leaves_nothing_wrong(tmp_path, monkeypatch, fails_at):
    writes, write_bytes = [], Path.write_bytes

    def full(path, data):
        writes.append(path)
        if len(writes) > fails_at:
            write_bytes(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(DataError, match="No space left"):
            make(tmp_path / "cache")
    with pytest.raises(DataError):
        ReferenceCache(tmp_path / "cache")
    assert_every_row_is_right(make(tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob("*.tmp")) and not (tmp_path / "cache" / "staging").exists()


def test_a_disk_too_small_is_said_before_the_first_forward(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: storage.shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DataError, match=r"the reference cache \(25 rows of 1040 bytes\) needs"):
        make(tmp_path / "cache", compute=lambda keys: pytest.fail("computed"))


HARNESS = """
    import os, random, signal, sys, time
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    import test_reference_cache as area
    from pgdpo_fast.errors import DataError
    from pgdpo_fast.reference.cache import ReferenceCache

    def child(path, log=None, pause=0.002):
        def compute(keys):
            time.sleep(pause)
            if log:
                with open(log, "a") as file:
                    file.write("".join(f"{{id}} {{draw}}\\n" for id, draw in keys))
            return area.compute_rows(keys)
        pid = os.fork()
        if pid:
            return pid
        try:
            area.make(path, compute=compute)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
"""


def in_fresh_process(script, *arguments):
    code = textwrap.dedent(HARNESS).format(tests=str(Path(__file__).parent)) + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_writers_killed_at_random_never_leave_a_wrong_row(tmp_path):
    out = in_fresh_process(
        """
        order, root, kills, opened, finished = random.Random(5), sys.argv[1], 0, 0, 0
        path = f"{root}/0"
        while kills < 40:
            pid = child(path)
            time.sleep(order.uniform(0, 0.1))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            kills += os.WIFSIGNALED(status)
            try:
                area.assert_every_row_is_right(ReferenceCache(path))
                opened += 1
            except DataError:
                pass
            if order.random() < 0.15:  # and now undisturbed
                assert os.waitpid(child(path), 0)[1] == 0
                area.assert_every_row_is_right(ReferenceCache(path))
                finished += 1
                path = f"{root}/{finished}"
        print(kills, opened, finished)
    """,
        tmp_path,
    )
    kills, _, finished = map(int, out.split())
    assert kills >= 40 and finished >= 3


def test_processes_share_the_work_and_take_over_from_the_dead(tmp_path):
    in_fresh_process(
        """
        path, log = f"{sys.argv[1]}/cache", f"{sys.argv[1]}/log"
        doomed = child(path, pause=0.2)
        time.sleep(0.3)
        others = [child(path, log) for _ in range(3)]
        time.sleep(0.05)
        os.kill(doomed, signal.SIGKILL)
        assert all(os.waitpid(pid, 0)[1] == 0 for pid in others)
        os.waitpid(doomed, 0)
        area.assert_every_row_is_right(ReferenceCache(path))
    """,
        tmp_path,
    )
    computed = (tmp_path / "log").read_text().splitlines()
    assert len(computed) == len(set(computed))  # no row by two of them
    assert len(computed) >= len(KEYS) - 6  # the doomed one made three forwards at most


def test_a_setting_that_came_later_and_is_unset_keeps_an_older_cache_valid():
    check_equal("cache", {"model.fps": 24.0}, {"model.fps": 24.0, "model.guidance": None}, "remedy")
    with pytest.raises(DataError, match="model.guidance was None, is now 5; remedy"):
        check_equal("cache", {"model.fps": 24.0}, {"model.fps": 24.0, "model.guidance": 5.0}, "remedy")
