"""tuner/fingerprint.py, fingerprint_rules.py, sass.py: what is counted, what is a regression, and planted ones in real images."""

import json

import pytest

from tests.tuner import planted_fingerprints, planted_programs
from tuner import sass
from tuner.errors import TuneError
from tuner.fingerprint import Fingerprint, Fingerprints, fingerprint, fingerprints_path, read_fingerprints, write_fingerprints
from tuner.fingerprint_rules import compare
from tuner.hardware import Hardware, find_compiler
from tuner.sass import count, find_nvdisasm


def has_tools():
    try:
        find_compiler(Hardware(profile="h100", name="H100", arch="sm_90a"))
        find_nvdisasm()
    except TuneError:
        return False
    return True


compiles = pytest.mark.skipif(not has_tools(), reason="no nvcc, or no nvdisasm (pip install nvidia-cuda-nvdisasm)")

SASS = """
	.section	.text.k,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.LTC128B.64.CONSTANT R4, desc[UR4][R2.64] ;
        /*0030*/              @UP1 LDG.E R4, desc[UR4][R2.64] ;
        /*0040*/                   LD.E.STRONG.GPU R4, [R2.64] ;
        /*0050*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0060*/                   LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64] ;
        /*0070*/                   STG.E.U8 desc[UR4][R2.64], R4 ;
        /*0080*/                   LDGSTS.E.BYPASS.LTC128B.128 [R4], desc[UR4][R2.64] ;
        /*0090*/                   UTMALDG.2D [UR8], [UR4] ;
        /*00a0*/                   UBLKCP.S.G [UR8], [UR4], UR6 ;
        /*00b0*/                   UBLKCP.G.S [UR8], [UR4], UR6 ;
        /*00c0*/                   LDS.128 R4, [R2] ;
        /*00d0*/                   LDSM.16.M88.4 R4, [R2] ;
        /*00e0*/                   LDSM.16.MT88.2 R4, [R2] ;
        /*00f0*/                   STS.U16 [R2], R4 ;
        /*0100*/                   LDL.LU R4, [R1] ;
        /*0110*/                   STL.64 [R1], R4 ;
        /*0120*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0130*/                   LDGDEPBAR ;
        /*0140*/                   ATOM.E.ADD.STRONG.GPU PT, R4, [R2], R5 ;
        /*0150*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24, !UPT ;
        /*0160*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0170*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0180*/                   HFMA2.MMA R4, -RZ, RZ, 0, 0 ;
        /*0190*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*01a0*/                   WARPGROUP.ARRIVE ;
        /*01b0*/                   EXIT ;
.L_x_1:
"""


def test_instructions_are_counted_by_width_and_kind():
    mix = count(SASS)
    assert mix.code == 28 * 16
    assert mix.loads == {"16": 1, "8": 1, "4": 2, "2": 1, "32": 1}
    assert mix.stores == {"1": 1, "bulk": 1}
    assert mix.copies == {"16": 1, "bulk": 2}
    assert mix.shared_loads == {"16": 2, "8": 1}
    assert mix.shared_stores == {"2": 1}
    assert (mix.local_loads, mix.local_stores, mix.barriers, mix.atomics) == (1, 1, 1, 1)
    assert mix.mma == {"HGMMA.64x32x16.F32.BF16": 1, "HMMA.16816.F32.BF16": 2}
    assert mix.mma_waits == 1


#: 12 blocks of 128 threads fit on a multiprocessor of sm_90a with 40 registers each.
PLAIN = Fingerprint(**planted_fingerprints.FIELDS)


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"stack": 8}, "regressed", "stack 0 -> 8 bytes a thread"),
        ({"local_loads": 3}, "regressed", "local-memory accesses 0 -> 3"),
        ({"loads": {"16": 19, "4": 9}}, "regressed", "narrower reads of global memory: 20 of 16 bytes, 5 of 4 bytes -> 19 of 16 bytes"),
        ({"loads": {"16": 20, "2": 10}}, "regressed", "narrower reads of global memory"),
        ({"stores": {"8": 8}}, "regressed", "narrower writes to global memory"),
        ({"shared_loads": {"16": 3, "4": 4}}, "regressed", "narrower reads of shared memory"),
        ({"loads": {"16": 40, "4": 5}}, "regressed", "more reads: global bytes read in the text 340 -> 660"),
        ({"loads": {"16": 20, "4": 10}}, "regressed", "more reads"),
        ({"loads": {"16": 20, "4": 9}}, None, ""),  # four coefficients more are under 5% of the bytes
        ({"loads": {"16": 40, "4": 10}, "stores": {"16": 8}}, None, ""),  # unrolled twice
        ({"loads": {"16": 20, "4": 5}, "stores": {"16": 2}}, "regressed", "more reads"),  # read twice, in loops half as long
        ({"stores": {"16": 8}}, "noted", "more writes"),
        ({"atomics": 1}, "regressed", "global atomics 0 -> 1"),
        ({"mma": {"HMMA.16816.F32.BF16": 4}}, "regressed", "matrix instructions HGMMA.64x32x16.F32.BF16 -> HMMA.16816.F32.BF16"),
        ({"mma": {"HGMMA.64x32x16.F32.BF16": 8}}, "noted", "HGMMA.64x32x16.F32.BF16 4 -> 8"),
        ({"mma": {"HGMMA.64x32x16.F32.BF16": 8}, "mma_waits": 2}, "noted", "HGMMA.64x32x16.F32.BF16 4 -> 8"),
        ({"mma_waits": 4}, "regressed", "matrix instructions waited for 1 -> 4 of 4 -> 4"),
        ({"shared": 4096}, "regressed", "shared memory 0 -> 4096 bytes a block"),
        ({"registers": 41}, "regressed", "occupancy 75.0% -> 62.5% (40 -> 41 registers"),
        ({"registers": 39}, "noted", "registers 40 -> 39, as many blocks fit"),
        ({"registers": 32}, "noted", "occupancy 75.0% -> 100.0%"),
        ({"code": 4480}, None, ""),
        ({"code": 8192}, "noted", "code 4096 -> 8192 bytes"),
        ({"barriers": 2}, "noted", "barriers 1 -> 2"),
        ({"threads": 256}, "noted", "threads 128 -> 256"),
        # the same bytes by async copies, and by the copy engine
        ({"loads": {"4": 5}, "copies": {"16": 20}}, None, ""),
        ({"loads": {"4": 5}, "copies": {"bulk": 1}}, "noted", "20 of 16 bytes, 5 of 4 bytes -> 5 of 4 bytes, 1 in bulk"),
        ({"loads": {"32": 10, "4": 5}}, "better", "wider reads of global memory"),
        ({"nvcc": "13.1.0"}, None, ""),
    ],
)
def test_each_rule_by_one_change(change, level, words):
    found = compare(PLAIN, PLAIN.model_copy(update=change), "sm_90a")
    assert (found[0].level if found else None) == level, found
    assert any(words in finding.text for finding in found) or not words, found
    undone = compare(PLAIN.model_copy(update=change), PLAIN, "sm_90a")
    if level == "regressed" and change.get("mma") is None:
        assert {f.level for f in undone} <= {"better", "noted"}, "what gets worse one way gets better the other"
    assert compare(PLAIN, PLAIN, "sm_90a") == []


def test_bulk_copies_are_counted_by_themselves():
    bulk = PLAIN.model_copy(update={"loads": {}, "copies": {"bulk": 2}})
    (first, *_) = compare(bulk, bulk.model_copy(update={"copies": {"bulk": 4}}), "sm_90a")
    assert (first.level, first.text.split(":")[0]) == ("regressed", "more reads")
    (first, second) = compare(bulk, bulk.model_copy(update={"copies": {"16": 20}, "atomics": 1}), "sm_90a")
    assert (first.level, first.text.split(",")[0]) == ("regressed", "without the copy engine")
    assert second.text == "global atomics 0 -> 1"


def test_a_file_of_fingerprints_comes_back_as_it_was_and_has_a_line_a_program(tmp_path):
    path = fingerprints_path(tmp_path / "h100.yaml")
    assert path.name == "h100.fingerprints.json"
    both = Fingerprints(arch="sm_90a", programs={"b (x=1)": PLAIN, "a (x=2)": PLAIN.model_copy(update={"stack": 8})})
    write_fingerprints(path, both)
    assert read_fingerprints(path) == both
    lines = path.read_text().splitlines()
    assert [line.strip()[:9] for line in lines if "registers" in line] == ['"a (x=2)"', '"b (x=1)"']


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no fingerprints to compare with; write them: mhc-tune check --static --gpu h100 --update"),
        ("{", "EOF"),
        ("[" * 100_000, "top level"),
        ("[]", "top level: got []"),
        ('{"arch": "sm_90a"}', "programs: missing"),
        ('{"arch": "cpu", "programs": {}}', "arch: got 'cpu'"),
        ('{"arch": "sm_90a", "programs": {"k": {"registers": -1}}}', "programs.k.registers: got -1"),
        (b"\xff", "is no UTF-8"),
    ],
)
def test_a_broken_file_is_refused_on_one_line(tmp_path, text, words):
    path = tmp_path / "x.fingerprints.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TuneError) as e:
        read_fingerprints(path)
    assert words in str(e.value)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_a_width_that_does_not_exist_is_refused(tmp_path):
    path = tmp_path / "x.json"
    fields = {**PLAIN.model_dump(), "loads": {"12": 1}}
    path.write_text(json.dumps({"schema_version": 1, "arch": "sm_90a", "programs": {"k": fields}}))
    with pytest.raises(TuneError, match=r"programs\.k\.loads\.12"):
        read_fingerprints(path)


def test_without_nvdisasm_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr(sass, "WHEEL", "no-such-wheel")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sass.os, "access", lambda *args: False)
    with pytest.raises(TuneError, match=r"no nvdisasm: .* wanted `pip install no-such-wheel`"):
        find_nvdisasm()


@compiles
@pytest.mark.parametrize(
    ("name", "words"),
    [("narrowed", "narrower reads of global memory: 4 of 16 bytes"), ("doubled", "more reads: "), ("spilled", "stack 0 -> ")],
)
def test_a_planted_regression_is_caught_in_the_image_and_the_original_is_the_same(name, words):
    original, worse = planted_programs.VARIANTS[name]
    p = original.problem(4, 2560)
    cfg = original.default(p)
    was, again, now = (fingerprint(kernel, p, cfg, "sm_90a") for kernel in (original, original, worse))
    assert compare(was, again, "sm_90a") == []
    found = compare(was, now, "sm_90a")
    assert any(f.level == "regressed" and f.text.startswith(words) for f in found), found
