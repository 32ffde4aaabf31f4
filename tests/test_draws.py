"""A draw is a pure function of (seed, pair id, draw index): right generator, right distribution, nothing else."""

import hashlib
import math
import struct

import pytest
import torch

import pgdpo_fast.diffusion.draw as draw_module
from pgdpo_fast.diffusion import draw_noise, draw_uniform
from pgdpo_fast.diffusion.draw import draw_key, philox4x32
from pgdpo_fast.errors import ConfigError


def tensors(words):
    return [torch.tensor([word]) for word in words]


def integers(words):
    return [int(word) for word in words]


def philox_in_python_integers(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % (1 << 32), (k[1] + 0xBB67AE85) % (1 << 32)]
    return c


def element_in_python(seed, pair_id, draw, index):
    """One noise value from the definition, with integers and math alone."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}\0{pair_id}".encode(), digest_size=8).digest(), "little")
    block, lane = divmod(index, 4)
    words = philox_in_python_integers([block % (1 << 32), block >> 32, draw, 0], [key % (1 << 32), key >> 32])
    radius_word, angle_word = words[:2] if lane < 2 else words[2:]
    radius = math.sqrt(-2 * math.log(((radius_word >> 8) + 1) / (1 << 24)))
    angle = 2 * math.pi * (angle_word >> 8) / (1 << 24)
    return radius * (math.sin(angle) if lane % 2 else math.cos(angle))


def ulps(left, right):
    """Distance of two float32 tensors in units in the last place."""

    def ordered(x):
        bits = x.contiguous().view(torch.int32).long()
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return (ordered(left) - ordered(right)).abs().max().item()


def correlation(left, right):
    left, right = left.double().flatten(), right.double().flatten()
    left, right = left - left.mean(), right - right.mean()
    return (left @ right / (left.norm() * right.norm())).item()


def kolmogorov_distance(samples, cdf):
    """Kolmogorov-Smirnov statistic times √n; above 2.3 has probability 5e-5 under the null hypothesis."""
    probabilities = cdf(samples.double().flatten().sort().values)
    n = probabilities.numel()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((probabilities - steps[:-1]).max(), (steps[1:] - probabilities).max())
    return distance.item() * math.sqrt(n)


ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_matches_the_published_vectors(counter, key, expected):
    assert integers(philox4x32(tensors(counter), tensors(key))) == expected


def test_philox_matches_python_integers_around_every_wrap():
    edges = [0, 1, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF, 0x12345678]
    for i in range(len(edges)):
        counter = [edges[(i + j * 3) % 8] for j in range(4)]
        key = [edges[(i + 5) % 8], edges[(i * 3 + 1) % 8]]
        assert integers(philox4x32(tensors(counter), tensors(key))) == philox_in_python_integers(counter, key)


@pytest.mark.parametrize("seed, pair_id, draw", [(0, "pair-0", 0), (-7, "écran\n", 3), (1 << 70, "", ONES)])
def test_noise_matches_its_definition_in_python(seed, pair_id, draw):
    noise = draw_noise(seed, [pair_id], [draw], (3, 7))[0].flatten()
    expected = torch.tensor([element_in_python(seed, pair_id, draw, i) for i in range(21)], dtype=torch.float64)
    assert ulps(noise, expected.float()) <= 1


def test_the_stream_is_frozen():
    # Reference caches on disk are keyed by (pair, draw): a change of these values makes every one of them wrong.
    noise = draw_noise(0, ["pair-0"], [0], (4,))[0]
    expected = torch.tensor([-1.028430461883545, -1.5547921657562256, 0.2217775583267212, -0.4908740520477295])
    assert ulps(noise, expected) <= 1
    assert draw_uniform(0, ["pair-0"], [0]).item() == 0.017635750822417084
    assert draw_key(0, "pair-0") == 0x4AD240711811A7D6


def test_block_index_carries_into_the_second_counter_word():
    start = (1 << 32) - 2
    out = torch.empty(1, 4, 4)
    key = draw_key(5, "pair")
    words = [torch.tensor([key & ONES]), torch.tensor([key >> 32])]
    draw_module._fill_normals(out, words, torch.tensor([9]), start)
    expected = [element_in_python(5, "pair", 9, 4 * start + i) for i in range(16)]
    assert ulps(out.flatten(), torch.tensor(expected, dtype=torch.float64).float()) <= 1


def test_an_element_does_not_depend_on_shape_batch_order_or_chunks(monkeypatch):
    full = draw_noise(3, ["a", "b", "c"], [5, 6, 7], (4, 3, 10, 11))
    flat = full.flatten(1)
    for size in (1, 2, 3, 4, 5, 331, 1319):
        assert torch.equal(draw_noise(3, ["a", "b", "c"], [5, 6, 7], (size,)), flat[:, :size])
    assert torch.equal(draw_noise(3, ["c", "a"], [7, 5], (1320,)), flat[[2, 0]])
    assert torch.equal(draw_noise(3, ["b"], 6, (2, 660)).flatten(), flat[1])
    for blocks in (1, 7, 64, 700):
        monkeypatch.setattr(draw_module, "_BLOCKS_CPU", blocks)
        assert torch.equal(draw_noise(3, ["a", "b", "c"], [5, 6, 7], (4, 3, 10, 11)), full)


def test_a_draw_does_not_depend_on_threads_or_the_global_generator():
    threads = torch.get_num_threads()
    expected = draw_noise(0, ["a"], [0], (300_001,))
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        torch.manual_seed(123)
        state = torch.get_rng_state()
        assert torch.equal(draw_noise(0, ["a"], [0], (300_001,)), expected)
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)


def test_seed_pair_and_draw_each_change_everything():
    base = draw_noise(0, ["a"], [0], (4096,))
    for other in (
        draw_noise(1, ["a"], [0], (4096,)),
        draw_noise(0, ["b"], [0], (4096,)),
        draw_noise(0, ["a"], [1], (4096,)),
    ):
        assert (other == base).sum() < 10
        assert abs(correlation(base, other)) < 5 / math.sqrt(4096)


def test_results_have_the_promised_shape_dtype_and_device():
    noise = draw_noise(0, ["a", "b"], torch.tensor([1, 2]), torch.Size([4, 2, 3, 3]), device="cpu")
    assert noise.shape == (2, 4, 2, 3, 3) and noise.dtype == torch.float32 and noise.is_contiguous()
    uniform = draw_uniform(0, ["a", "b"], torch.tensor([1, 2]))
    assert uniform.shape == (2,) and uniform.dtype == torch.float64
    assert draw_noise(0, [], [], (4,)).shape == (0, 4) and draw_uniform(0, [], []).shape == (0,)
    assert torch.equal(draw_noise(0, [17], 0, (5,)), draw_noise(0, ["17"], 0, (5,)))


def test_default_dtype_and_device_contexts_change_nothing():
    expected = draw_noise(0, ["a"], [0], (9,)), draw_uniform(0, ["a"], [0], strata=4)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            found = draw_noise(0, ["a"], [0], (9,)), draw_uniform(0, ["a"], [0], strata=4)
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.fixture(scope="module")
def many():
    """One video of 1.3 M normals from each of two pairs and two draws."""
    return draw_noise(20, ["a", "a", "b", "b"], [0, 1, 0, 1], (16, 21, 60, 64))


def test_noise_is_standard_normal(many):
    n = many.numel()
    samples = many.double().flatten()
    assert abs(samples.mean().item()) < 4 / math.sqrt(n)
    assert abs(samples.square().mean().item() - 1) < 4 * math.sqrt(2 / n)
    assert abs(samples.pow(3).mean().item()) < 4 * math.sqrt(15 / n)
    assert abs(samples.pow(4).mean().item() - 3) < 4 * math.sqrt(96 / n)
    assert kolmogorov_distance(samples, torch.special.ndtr) < 2.3
    assert 4.8 < samples.abs().max().item() < 5.77
    tail = (samples.abs() > 4).double().mean().item()
    assert abs(tail - 6.334e-5) < 4 * math.sqrt(6.334e-5 / n)


def test_noise_is_independent_across_pairs_draws_blocks_and_lanes(many):
    limit = 4.5 / math.sqrt(many[0].numel() / 4)
    for i in range(4):
        for j in range(i):
            assert abs(correlation(many[i], many[j])) < limit
    blocks = many[0].reshape(-1, 4)
    for values in (blocks, blocks.square()):
        for lag in (1, 2, 3, 84, 1024):
            assert abs(correlation(values[lag:], values[:-lag])) < limit
        for i in range(4):
            for j in range(i):
                assert abs(correlation(values[:, i], values[:, j])) < limit


@pytest.fixture(scope="module")
def uniforms():
    return draw_uniform(4, [f"pair-{i}" for i in range(500)] * 40, [i for i in range(40) for _ in range(500)])


def test_timestep_uniforms_are_uniform_and_open(uniforms):
    assert kolmogorov_distance(uniforms, lambda u: u) < 2.3
    assert uniforms.min() > 0 and uniforms.max() < 1
    assert uniforms.unique().numel() == uniforms.numel()
    # 32 random bits and more: the low half of the 52 bits is as lively as the high half.
    low_bits = (uniforms * 2.0**26) % 1
    assert kolmogorov_distance(low_bits, lambda u: u) < 2.3
    grid = uniforms.view(40, 500)
    assert abs(correlation(grid[1:], grid[:-1])) < 4.5 / math.sqrt(19_500)
    assert abs(correlation(grid[:, 1:], grid[:, :-1])) < 4.5 / math.sqrt(19_500)


@pytest.mark.parametrize("words", [(0, 0), (ONES, ONES)])
def test_the_extreme_uniforms_are_neither_zero_nor_one(monkeypatch, words):
    high, low = words
    monkeypatch.setattr(draw_module, "philox4x32", lambda counter, key: tensors([high, low, 0, 0]))
    value = draw_uniform(0, ["a"], [0]).item()
    assert 0 < value < 1 and min(value, 1 - value) == 2.0**-53


def test_the_extreme_words_give_finite_noise(monkeypatch):
    def extremes(counter, key):
        return [torch.tensor([[0, ONES]]), torch.tensor([[0, ONES]]), torch.tensor([[0, ONES]]), torch.tensor([[0, 0]])]

    monkeypatch.setattr(draw_module, "philox4x32", extremes)
    noise = draw_noise(0, ["a"], [0], (8,))[0]
    assert torch.isfinite(noise).all()
    assert noise[0].item() == pytest.approx(math.sqrt(48 * math.log(2)), rel=1e-6) and noise[4].abs().item() == 0


def test_timestep_uniform_is_independent_of_the_noise_of_its_draw():
    ids = [f"pair-{i}" for i in range(4000)]
    first = draw_noise(0, ids, 0, (4,))
    uniform = draw_uniform(0, ids, 0)
    for lane in range(4):
        assert abs(correlation(uniform, first[:, lane])) < 4.5 / math.sqrt(4000)
        assert abs(correlation((uniform - 0.5).abs(), first[:, lane].abs())) < 4.5 / math.sqrt(4000)


@pytest.mark.parametrize("strata", [2, 5, 16])
def test_stratified_draws_visit_every_stratum_and_stay_uniform(strata):
    pairs, runs = 200, 3
    draws = list(range(runs * strata))
    table = torch.stack([draw_uniform(1, [f"pair-{i}"] * len(draws), draws, strata=strata) for i in range(pairs)])
    strata_hit = (table * strata).long().view(pairs, runs, strata).sort().values
    assert torch.equal(strata_hit, torch.arange(strata).expand_as(strata_hit))
    for draw in (0, strata - 1, strata):
        assert kolmogorov_distance(table[:, draw], lambda u: u) < 2.3
    assert table[:, 0].unique().numel() == pairs
    # A pure function: any single entry can be asked for alone, and one stratum is no stratification.
    assert draw_uniform(1, ["pair-7"], [strata + 1], strata=strata).item() == table[7, strata + 1].item()
    assert torch.equal(draw_uniform(1, ["a"], [3], strata=1), draw_uniform(1, ["a"], [3]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(seed=1.5), "seed=1.5"),
        (dict(seed=True), "seed=True"),
        (dict(pair_ids="ab"), "list of ids"),
        (dict(pair_ids=[1.0, 2.0]), "pair id 1.0"),
        (dict(draws=[0]), "1 draws for 2 pair ids"),
        (dict(draws=[0, -1]), "draw -1"),
        (dict(draws=[0, 1 << 32]), "draw 4294967296"),
        (dict(draws=[0, 0.5]), "draw 0.5"),
        (dict(shape=(4, 0)), "positive integers"),
        (dict(shape=(4, 2.0)), "positive integers"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        draw_noise(**{"seed": 0, "pair_ids": ["a", "b"], "draws": [0, 1], "shape": (4,), **arguments})


@pytest.mark.parametrize("strata", [0, -1, 1.5, True, 1 << 20])
def test_impossible_strata_are_named(strata):
    with pytest.raises(ConfigError, match="strata"):
        draw_uniform(0, ["a"], [0], strata=strata)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_draws_equal_cpu_draws():
    ids, draws = ["a", "b", "c"], [0, 1, ONES]
    expected = draw_noise(11, ids, draws, (16, 5, 60, 67))
    found = draw_noise(11, ids, draws, (16, 5, 60, 67), device="cuda").cpu()
    assert ulps(found, expected) <= 1


def test_ulps_can_see_one_ulp():
    one = torch.tensor([1.0, -1.0])
    above = torch.tensor(struct.unpack("<2f", struct.pack("<2I", 0x3F800001, 0xBF800000)))
    assert ulps(one, above) == 1 and ulps(torch.tensor([-0.0]), torch.tensor([0.0])) == 0
