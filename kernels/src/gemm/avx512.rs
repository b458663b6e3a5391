//! The register tile of products for AVX-512, in assembly.
//!
//! Compiled from Rust, the loop's 24 sums were kept in registers or not depending on the code around it:
//! a change of its caller cost a third of the speed. Written out, a step is what the drawing in
//! [`super`] says: two vectors of B, and for every row one broadcast cell of A and two products.

use std::arch::asm;

use super::Job;

/// Reads or writes a row of sums in the tile.
macro_rules! sums {
    (load, 2, $low:literal, $high:literal, $at:literal) => {
        concat!("vmovups ", $low, ", [{tile} + ", $at, "]\nvmovups ", $high, ", [{tile} + ", $at, " + 64]\n")
    };
    (load, 1, $low:literal, $high:literal, $at:literal) => {
        concat!("vmovups ", $low, ", [{tile} + ", $at, "]\n")
    };
    (store, 2, $low:literal, $high:literal, $at:literal) => {
        concat!("vmovups [{tile} + ", $at, "], ", $low, "\nvmovups [{tile} + ", $at, " + 64], ", $high, "\n")
    };
    (store, 1, $low:literal, $high:literal, $at:literal) => {
        concat!("vmovups [{tile} + ", $at, "], ", $low, "\n")
    };
    (zero, 2, $low:literal, $high:literal, $at:literal) => {
        concat!("vpxord ", $low, ", ", $low, ", ", $low, "\nvpxord ", $high, ", ", $high, ", ", $high, "\n")
    };
    (zero, 1, $low:literal, $high:literal, $at:literal) => {
        concat!("vpxord ", $low, ", ", $low, ", ", $low, "\n")
    };
}

/// The same for row `$row` of the tile: its registers and its place.
macro_rules! sums_of_row {
    ($what:tt, $vectors:tt, 0) => {
        sums!($what, $vectors, "zmm0", "zmm1", "0")
    };
    ($what:tt, $vectors:tt, 1) => {
        sums!($what, $vectors, "zmm2", "zmm3", "128")
    };
    ($what:tt, $vectors:tt, 2) => {
        sums!($what, $vectors, "zmm4", "zmm5", "256")
    };
    ($what:tt, $vectors:tt, 3) => {
        sums!($what, $vectors, "zmm6", "zmm7", "384")
    };
    ($what:tt, $vectors:tt, 4) => {
        sums!($what, $vectors, "zmm8", "zmm9", "512")
    };
    ($what:tt, $vectors:tt, 5) => {
        sums!($what, $vectors, "zmm10", "zmm11", "640")
    };
    ($what:tt, $vectors:tt, 6) => {
        sums!($what, $vectors, "zmm12", "zmm13", "768")
    };
    ($what:tt, $vectors:tt, 7) => {
        sums!($what, $vectors, "zmm14", "zmm15", "896")
    };
    ($what:tt, $vectors:tt, 8) => {
        sums!($what, $vectors, "zmm16", "zmm17", "1024")
    };
    ($what:tt, $vectors:tt, 9) => {
        sums!($what, $vectors, "zmm18", "zmm19", "1152")
    };
    ($what:tt, $vectors:tt, 10) => {
        sums!($what, $vectors, "zmm20", "zmm21", "1280")
    };
    ($what:tt, $vectors:tt, 11) => {
        sums!($what, $vectors, "zmm22", "zmm23", "1408")
    };
}

/// One cell of A times the vectors of B, which are in zmm24 and zmm25.
macro_rules! products {
    ($dot:literal, 2, $low:literal, $high:literal, $a:literal, $at:literal) => {
        concat!(
            "vbroadcastss ",
            $a,
            ", dword ptr [",
            $at,
            "]\n",
            $dot,
            " ",
            $low,
            ", zmm24, ",
            $a,
            "\n",
            $dot,
            " ",
            $high,
            ", zmm25, ",
            $a,
            "\n",
        )
    };
    ($dot:literal, 1, $low:literal, $high:literal, $a:literal, $at:literal) => {
        concat!("vbroadcastss ", $a, ", dword ptr [", $at, "]\n", $dot, " ", $low, ", zmm24, ", $a, "\n")
    };
}

/// The same for row `$row`. Rows are reached from every fourth, by one, two and three strides.
macro_rules! products_of_row {
    ($dot:literal, $vectors:tt, 0) => {
        products!($dot, $vectors, "zmm0", "zmm1", "zmm28", "{a0}")
    };
    ($dot:literal, $vectors:tt, 1) => {
        products!($dot, $vectors, "zmm2", "zmm3", "zmm29", "{a0} + {stride}")
    };
    ($dot:literal, $vectors:tt, 2) => {
        products!($dot, $vectors, "zmm4", "zmm5", "zmm30", "{a0} + 2 * {stride}")
    };
    ($dot:literal, $vectors:tt, 3) => {
        products!($dot, $vectors, "zmm6", "zmm7", "zmm31", "{a0} + {stride3}")
    };
    ($dot:literal, $vectors:tt, 4) => {
        products!($dot, $vectors, "zmm8", "zmm9", "zmm28", "{a4}")
    };
    ($dot:literal, $vectors:tt, 5) => {
        products!($dot, $vectors, "zmm10", "zmm11", "zmm29", "{a4} + {stride}")
    };
    ($dot:literal, $vectors:tt, 6) => {
        products!($dot, $vectors, "zmm12", "zmm13", "zmm30", "{a4} + 2 * {stride}")
    };
    ($dot:literal, $vectors:tt, 7) => {
        products!($dot, $vectors, "zmm14", "zmm15", "zmm31", "{a4} + {stride3}")
    };
    ($dot:literal, $vectors:tt, 8) => {
        products!($dot, $vectors, "zmm16", "zmm17", "zmm28", "{a8}")
    };
    ($dot:literal, $vectors:tt, 9) => {
        products!($dot, $vectors, "zmm18", "zmm19", "zmm29", "{a8} + {stride}")
    };
    ($dot:literal, $vectors:tt, 10) => {
        products!($dot, $vectors, "zmm20", "zmm21", "zmm30", "{a8} + 2 * {stride}")
    };
    ($dot:literal, $vectors:tt, 11) => {
        products!($dot, $vectors, "zmm22", "zmm23", "zmm31", "{a8} + {stride3}")
    };
}

macro_rules! load_b {
    (2) => {
        "vmovups zmm24, [{b}]\nvmovups zmm25, [{b} + 64]\n"
    };
    (1) => {
        "vmovups zmm24, [{b}]\n"
    };
}

macro_rules! tile {
    ($job:ident, $dot:literal, $vectors:tt, $($row:tt)*) => {{
        let Job { a, row_stride, step_stride, b, steps, begin, ahead, tile } = $job;
        let stride = 4 * row_stride;
        let a4 = a.wrapping_add(4 * row_stride);
        let a8 = a.wrapping_add(8 * row_stride);
        // SAFETY: the processor has the instructions and the job's memory is there, as the caller promises;
        // every register that is written is named or clobbered.
        unsafe {
            asm!(
                "test {begin:l}, {begin:l}",
                "jz 2f",
                $(sums_of_row!(zero, $vectors, $row),)*
                "jmp 3f",
                "2:",
                $(sums_of_row!(load, $vectors, $row),)*
                "3:",
                "test {steps}, {steps}",
                "jz 5f",
                ".p2align 5",
                "4:",
                load_b!($vectors),
                "prefetcht1 [{ahead}]",
                $(products_of_row!($dot, $vectors, $row),)*
                "add {b}, 128",
                "add {ahead}, 64",
                "add {a0}, {step}",
                "add {a4}, {step}",
                "add {a8}, {step}",
                "dec {steps}",
                "jnz 4b",
                "5:",
                $(sums_of_row!(store, $vectors, $row),)*
                // Rows that this tile does not have are reached by no instruction, but are operands of all.
                "# {stride} {stride3}",
                a0 = inout(reg) a => _,
                a4 = inout(reg) a4 => _,
                a8 = inout(reg) a8 => _,
                stride = in(reg) stride,
                stride3 = in(reg) 3 * stride,
                step = in(reg) 4 * step_stride,
                b = inout(reg) b => _,
                ahead = inout(reg) ahead => _,
                steps = inout(reg) steps => _,
                begin = in(reg) u64::from(begin),
                tile = in(reg) tile.as_mut_ptr(),
                out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _,
                out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _, out("zmm16") _, out("zmm17") _,
                out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
                out("zmm24") _, out("zmm25") _, out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
                options(nostack),
            );
        }
    }};
}

macro_rules! by_rows {
    ($job:ident, $rows:ident, $dot:literal, $vectors:tt) => {
        match $rows {
            1 => tile!($job, $dot, $vectors, 0),
            2 => tile!($job, $dot, $vectors, 0 1),
            3 => tile!($job, $dot, $vectors, 0 1 2),
            4 => tile!($job, $dot, $vectors, 0 1 2 3),
            5 => tile!($job, $dot, $vectors, 0 1 2 3 4),
            6 => tile!($job, $dot, $vectors, 0 1 2 3 4 5),
            7 => tile!($job, $dot, $vectors, 0 1 2 3 4 5 6),
            8 => tile!($job, $dot, $vectors, 0 1 2 3 4 5 6 7),
            9 => tile!($job, $dot, $vectors, 0 1 2 3 4 5 6 7 8),
            10 => tile!($job, $dot, $vectors, 0 1 2 3 4 5 6 7 8 9),
            11 => tile!($job, $dot, $vectors, 0 1 2 3 4 5 6 7 8 9 10),
            12 => tile!($job, $dot, $vectors, 0 1 2 3 4 5 6 7 8 9 10 11),
            _ => unreachable!("a tile has 1 to 12 rows"),
        }
    };
}

/// Cells of one f32.
///
/// # Safety
///
/// The processor must have AVX-512 F, and the job must hold what [`Job`] says for `rows` rows.
#[inline(never)]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn f32_tile(job: Job, rows: usize, vectors: usize) {
    match vectors {
        2 => by_rows!(job, rows, "vfmadd231ps", 2),
        _ => by_rows!(job, rows, "vfmadd231ps", 1),
    }
}

/// Cells of two bf16.
///
/// # Safety
///
/// The processor must have AVX-512 with bf16, and the job must hold what [`Job`] says for `rows` rows.
#[inline(never)]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn bf16_tile(job: Job, rows: usize, vectors: usize) {
    match vectors {
        2 => by_rows!(job, rows, "vdpbf16ps", 2),
        _ => by_rows!(job, rows, "vdpbf16ps", 1),
    }
}
