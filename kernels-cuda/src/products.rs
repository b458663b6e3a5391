//! Matrix products by cuBLASLt.
//!
//! cuBLASLt proposes algorithms for a product, and its first is up to a fifth slower than its best. So the first use of
//! a shape times them, and the choice is kept: on disk by GPU and library version, since another algorithm rounds
//! differently and a resumed run has to give the same bits.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::fs;
use std::path::PathBuf;
use std::ptr;
use std::sync::Mutex;

use crate::bindings::*;
use crate::compiler::{cache_folder, fingerprint, keep};
use crate::error::{Error, Result};
use crate::machine::{Epilogue, Facts, Form, Kind, Operands, Product};
use crate::real::{Pointer, elapsed};

/// Scratch memory that algorithms may use. 32 MiB is NVIDIA's advice for Hopper.
const WORKSPACE: usize = 32 << 20;

/// Algorithms that are timed.
const PROPOSALS: usize = 16;

/// cuBLASLt, and the products that were made so far.
pub(crate) struct Products {
    blas: &'static BlasLt,
    driver: &'static Driver,
    handle: Pointer,
    stream: Pointer,
    workspace: u64,
    ready: Mutex<HashMap<Product, Ready>>,
    choices: Mutex<Choices>,
}

/// cuBLASLt's descriptions of a product, and the algorithm for it.
#[derive(Clone, Copy)]
struct Ready {
    description: Pointer,
    a: Pointer,
    b: Pointer,
    d: Pointer,
    algorithm: Algorithm,
}

impl Products {
    /// The context must be current.
    pub(crate) fn new(blas: &'static BlasLt, driver: &'static Driver, stream: Pointer, facts: &Facts) -> Result<Self> {
        let (mut handle, mut workspace) = (ptr::null_mut(), 0);
        // SAFETY: results are written to live variables.
        let version = unsafe {
            check("cublasLtCreate", (blas.cublasLtCreate)(&mut handle))?;
            check("cuMemAlloc", (driver.cuMemAlloc_v2)(&mut workspace, WORKSPACE))?;
            (blas.cublasLtGetVersion)()
        };
        let choices = Mutex::new(Choices::open(facts, version));
        let (handle, ready) = (Pointer(handle), Mutex::default());
        Ok(Self { blas, driver, handle, stream, workspace, ready, choices })
    }

    /// The algorithms chosen so far, as lines of text.
    pub(crate) fn choices(&self) -> String {
        self.choices.lock().expect("not poisoned").text()
    }

    /// Uses these in place of others from now on.
    pub(crate) fn adopt(&self, choices: &str) -> bool {
        let is_same = self.choices.lock().expect("not poisoned").adopt(choices);
        self.ready.lock().expect("not poisoned").clear();
        is_same
    }

    /// # Safety
    ///
    /// The operands are allocated for the sizes and formats of `product`, and the context is current.
    pub(crate) unsafe fn run(&self, product: &Product, operands: &Operands) -> Result<()> {
        // One product at a time: descriptions hold the addresses of bias and auxiliary matrix.
        let mut all = self.ready.lock().expect("not poisoned");
        let ready = match all.get(product) {
            Some(ready) => *ready,
            None => {
                // SAFETY: by the caller's promise.
                let ready = unsafe { self.prepare(product, operands) }?;
                all.insert(*product, ready);
                ready
            }
        };
        // SAFETY: by the caller's promise.
        unsafe {
            self.point(product, ready.description, operands)?;
            self.multiply(product, &ready, &ready.algorithm, operands)
        }
    }

    /// # Safety
    ///
    /// As for `run`.
    unsafe fn prepare(&self, product: &Product, operands: &Operands) -> Result<Ready> {
        let Product { form, rows, columns, inner, operands: kind, out, .. } = *product;
        let compute = if product.tf32 { COMPUTE_TF32 } else { COMPUTE_32F };
        // cuBLASLt's matrices are column-major: row-major ones are their transposes, and D^T = B^T A^T.
        let (a, b, transposed) = match form {
            Form::Forward => ((inner, columns), (inner, rows), (1, 0)),
            Form::Input => ((columns, inner), (inner, rows), (0, 0)),
            Form::Weight => ((columns, inner), (rows, inner), (0, 1)),
        };
        let layout = |(rows, columns): (usize, usize), kind: Kind| {
            let mut layout = ptr::null_mut();
            // SAFETY: written to a live variable.
            let status = unsafe {
                (self.blas.cublasLtMatrixLayoutCreate)(
                    &mut layout,
                    format(kind),
                    rows as u64,
                    columns as u64,
                    rows as i64,
                )
            };
            check("cublasLtMatrixLayoutCreate", status).map(|()| Pointer(layout))
        };
        let mut description = ptr::null_mut();
        // SAFETY: written to a live variable.
        let status = unsafe { (self.blas.cublasLtMatmulDescCreate)(&mut description, compute, R_32F) };
        check("cublasLtMatmulDescCreate", status)?;
        let description = Pointer(description);
        self.set(description, DESC_TRANSPOSE_A, c_int::from(transposed.0 == 1))?;
        self.set(description, DESC_TRANSPOSE_B, c_int::from(transposed.1 == 1))?;
        if kind == Kind::E4m3 {
            // Sums of a few products in fewer bits than f32, as attacks may have them.
            self.set(description, DESC_FAST_SUMS, 1i8)?;
            self.set(description, DESC_SCALES_A, SCALES_BY_ROW)?;
            self.set(description, DESC_SCALES_B, SCALES_BY_ROW)?;
            self.set(description, DESC_BIAS_FORMAT, R_16BF)?;
        }
        let epilogue = match product.epilogue {
            Epilogue::None => EPILOGUE_DEFAULT,
            Epilogue::Bias => EPILOGUE_BIAS,
            Epilogue::Gelu => EPILOGUE_GELU_BIAS,
            Epilogue::GeluAux => EPILOGUE_GELU_AUX_BIAS,
            Epilogue::GeluGradient => EPILOGUE_DGELU,
        };
        self.set(description, DESC_EPILOGUE, epilogue)?;
        if matches!(product.epilogue, Epilogue::GeluAux | Epilogue::GeluGradient) {
            self.set(description, DESC_AUX_STRIDE, columns as i64)?;
        }
        // SAFETY: by the caller's promise.
        unsafe { self.point(product, description, operands) }?;
        let mut ready = Ready {
            description,
            a: layout(a, kind)?,
            b: layout(b, kind)?,
            d: layout((columns, rows), out)?,
            algorithm: Algorithm::default(),
        };
        let key = format!("{product:?}");
        let known = self.choices.lock().expect("not poisoned").get(&key);
        ready.algorithm = match known {
            Some(algorithm) => algorithm,
            None => {
                // SAFETY: by the caller's promise.
                let algorithm = unsafe { self.fastest(product, &ready, operands) }?;
                self.choices.lock().expect("not poisoned").add(key, algorithm);
                algorithm
            }
        };
        Ok(ready)
    }

    /// The fastest of cuBLASLt's proposals, by three timed runs each into scratch memory.
    ///
    /// # Safety
    ///
    /// As for `run`.
    unsafe fn fastest(&self, product: &Product, ready: &Ready, operands: &Operands) -> Result<Algorithm> {
        let proposals = self.proposals(product, ready)?;
        if proposals.len() == 1 {
            return Ok(proposals[0]);
        }
        let mut scratch = 0;
        let bytes = product.rows * product.columns * product.out.bytes();
        // SAFETY: written to a live variable. Without room the first proposal serves.
        if unsafe { (self.driver.cuMemAlloc_v2)(&mut scratch, bytes.max(1)) } != 0 {
            return Ok(proposals[0]);
        }
        // What the epilogue stores besides D has the same values in every run; D may be C, so it goes to scratch
        // memory.
        let operands = Operands { d: scratch, ..*operands };
        let mut best = (f64::INFINITY, proposals[0]);
        for algorithm in proposals {
            // SAFETY: by the caller's promise.
            let once = || unsafe { self.multiply(product, ready, &algorithm, &operands) };
            if once().is_err() {
                continue;
            }
            let mut seconds = f64::INFINITY;
            for _ in 0..3 {
                seconds = seconds.min(elapsed(self.driver, self.stream, once)?);
            }
            if seconds < best.0 {
                best = (seconds, algorithm);
            }
        }
        // SAFETY: allocated above; the timed runs are done.
        unsafe { (self.driver.cuMemFree_v2)(scratch) };
        Ok(best.1)
    }

    fn proposals(&self, product: &Product, ready: &Ready) -> Result<Vec<Algorithm>> {
        let mut found = [Proposal::default(); PROPOSALS];
        let (mut preference, mut count) = (ptr::null_mut(), 0);
        // SAFETY: handles are live, results are written to live memory of the size named.
        let status = unsafe {
            check("cublasLtMatmulPreferenceCreate", (self.blas.cublasLtMatmulPreferenceCreate)(&mut preference))?;
            let workspace = WORKSPACE;
            let value: *const usize = &workspace;
            (self.blas.cublasLtMatmulPreferenceSetAttribute)(
                preference,
                PREFERENCE_WORKSPACE,
                value.cast(),
                size_of::<usize>(),
            );
            let status = (self.blas.cublasLtMatmulAlgoGetHeuristic)(
                self.handle.0,
                ready.description.0,
                ready.a.0,
                ready.b.0,
                ready.d.0,
                ready.d.0,
                preference,
                PROPOSALS as c_int,
                found.as_mut_ptr(),
                &mut count,
            );
            (self.blas.cublasLtMatmulPreferenceDestroy)(preference);
            status
        };
        let usable: Vec<_> = found[..count.max(0) as usize]
            .iter()
            .filter(|found| found.state == 0)
            .map(|found| found.algorithm)
            .collect();
        if status != 0 || usable.is_empty() {
            return Err(Error::failed(format!("cuBLASLt has no algorithm for {product:?} ({status})")));
        }
        Ok(usable)
    }

    /// # Safety
    ///
    /// As for `run`; `ready` is of this product.
    unsafe fn multiply(
        &self,
        product: &Product,
        ready: &Ready,
        algorithm: &Algorithm,
        operands: &Operands,
    ) -> Result<()> {
        let (one, beta) = (1.0f32, if product.add { 1.0f32 } else { 0.0 });
        let pointer = |at: u64| at as *const c_void;
        let c = if product.add { operands.c } else { operands.d };
        // SAFETY: by the caller's promise; factors are read before the call returns.
        let status = unsafe {
            (self.blas.cublasLtMatmul)(
                self.handle.0,
                ready.description.0,
                (&raw const one).cast(),
                pointer(operands.b),
                ready.a.0,
                pointer(operands.a),
                ready.b.0,
                (&raw const beta).cast(),
                pointer(c),
                ready.d.0,
                pointer(operands.d).cast_mut(),
                ready.d.0,
                algorithm,
                pointer(self.workspace).cast_mut(),
                WORKSPACE,
                self.stream.0,
            )
        };
        check(&format!("cublasLtMatmul of {product:?}"), status)
    }

    /// Sets the addresses that are part of the description.
    ///
    /// # Safety
    ///
    /// As for `run`.
    unsafe fn point(&self, product: &Product, description: Pointer, operands: &Operands) -> Result<()> {
        if matches!(product.epilogue, Epilogue::Bias | Epilogue::Gelu | Epilogue::GeluAux) {
            self.set(description, DESC_BIAS, operands.bias)?;
        }
        if matches!(product.epilogue, Epilogue::GeluAux | Epilogue::GeluGradient) {
            self.set(description, DESC_AUX, operands.aux)?;
        }
        if product.operands == Kind::E4m3 {
            // A and B change places, see `prepare`.
            self.set(description, DESC_SCALE_A, operands.scales[1])?;
            self.set(description, DESC_SCALE_B, operands.scales[0])?;
        }
        Ok(())
    }

    fn set<T>(&self, description: Pointer, attribute: c_int, value: T) -> Result<()> {
        // SAFETY: the description is live; the value is copied, of the size that the attribute has.
        let status = unsafe {
            (self.blas.cublasLtMatmulDescSetAttribute)(
                description.0,
                attribute,
                (&raw const value).cast(),
                size_of::<T>(),
            )
        };
        check("cublasLtMatmulDescSetAttribute", status)
    }
}

fn format(kind: Kind) -> c_int {
    match kind {
        Kind::F32 => R_32F,
        Kind::Bf16 => R_16BF,
        Kind::E4m3 => R_8F_E4M3,
    }
}

fn check(what: &str, status: Status) -> Result<()> {
    match status {
        0 => Ok(()),
        _ => Err(Error::failed(format!("cuBLASLt: {what} returned {status}"))),
    }
}

/// The algorithms chosen so far, on disk too: a line for the GPU and the library's version, then one for each product
/// with eight numbers and a fingerprint.
struct Choices {
    path: Option<PathBuf>,
    /// GPU and version.
    of: String,
    known: HashMap<String, Algorithm>,
}

impl Choices {
    fn open(facts: &Facts, version: usize) -> Self {
        let name: String = facts.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        let of = format!("{name}-{version}");
        let path = cache_folder().map(|folder| folder.join(format!("products-{of}.txt")));
        let text = path.as_ref().and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        let mut choices = Self { path, of, known: HashMap::new() };
        choices.adopt(&text);
        choices
    }

    /// Takes over choices made on the same GPU with the same library; algorithms mean nothing to others.
    fn adopt(&mut self, text: &str) -> bool {
        let mut lines = text.lines();
        let is_same = lines.next() == Some(&self.of);
        if is_same {
            self.known.extend(lines.filter_map(Self::parse));
        }
        is_same
    }

    fn text(&self) -> String {
        let mut lines: Vec<_> = self.known.iter().map(|(key, algorithm)| Self::line(key, algorithm)).collect();
        lines.sort();
        format!("{}\n{}", self.of, lines.concat())
    }

    fn get(&self, key: &str) -> Option<Algorithm> {
        self.known.get(key).copied()
    }

    fn add(&mut self, key: String, algorithm: Algorithm) {
        self.known.insert(key, algorithm);
        if let Some(path) = &self.path {
            keep(path, self.text().as_bytes());
        }
    }

    fn line(key: &str, algorithm: &Algorithm) -> String {
        let numbers: Vec<_> = algorithm.data.iter().map(|number| format!("{number:x}")).collect();
        let text = format!("{key}\t{}", numbers.join(" "));
        // cuBLASLt does not check what it is given, so a line has its fingerprint.
        format!("{text}\t{:x}\n", fingerprint(text.as_bytes()))
    }

    fn parse(line: &str) -> Option<(String, Algorithm)> {
        let (text, seal) = line.rsplit_once('\t')?;
        (seal == format!("{:x}", fingerprint(text.as_bytes()))).then_some(())?;
        let (key, numbers) = text.split_once('\t')?;
        let numbers: Option<Vec<_>> = numbers.split(' ').map(|number| u64::from_str_radix(number, 16).ok()).collect();
        Some((key.to_owned(), Algorithm { data: numbers?.try_into().ok()? }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_of_another_gpu_or_library_are_not_adopted() {
        let choices = |of: &str| Choices { path: None, of: of.into(), known: HashMap::new() };
        let mut first = choices("H100-130100");
        first.known.insert("product".into(), Algorithm { data: [1; 8] });
        for (of, count) in [("H100-130100", 1), ("H200-130100", 0), ("H100-130200", 0)] {
            let mut second = choices(of);
            second.adopt(&first.text());
            assert_eq!(second.known.len(), count, "{of}");
        }
    }

    #[test]
    fn a_choice_is_read_as_it_was_written_and_damaged_lines_are_left_out() {
        let algorithm = Algorithm { data: [1, 0, u64::MAX, 4, 5, 6, 7, 8] };
        let line = Choices::line("Product { rows: 3 }", &algorithm);
        assert_eq!(Choices::parse(line.trim_end()), Some(("Product { rows: 3 }".to_owned(), algorithm)));
        for damaged in ["", "key", "key\t1 2 3", "key\t1 2 3 4 5 6 7 8\t0", &line.replace('4', "5"), &line[1..]] {
            assert_eq!(Choices::parse(damaged.trim_end()), None);
        }
    }
}
