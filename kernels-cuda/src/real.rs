//! An NVIDIA GPU through its driver: the primary context, its streams, kernels and products.

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::ptr;
use std::sync::Mutex;
use std::thread;

use crate::bindings::{self, Driver, Handle, Nccl, Status};
use crate::compiler::{Compiler, text};
use crate::error::{Error, ErrorKind, Result};
use crate::libraries;
use crate::machine::{EventId, ExchangeWork, Facts, Launch, Machine, Operands, Product, Stream};
use crate::products::Products;
use crate::programs::Program;

/// One GPU.
pub(crate) struct Real {
    driver: &'static Driver,
    context: Pointer,
    /// Major version of CUDA that the driver supports.
    major: i32,
    stream: Pointer,
    exchange_stream: Pointer,
    upload_stream: Pointer,
    facts: Facts,
    compiler: Compiler,
    /// Programs on the GPU, and kernels looked up in them.
    modules: Mutex<HashMap<Program, Pointer>>,
    kernels: Mutex<HashMap<String, Kernel>>,
    products: Products,
    /// Wait after every launch, so that a failure names its kernel.
    careful: bool,
}

/// A handle of the driver.
#[derive(Clone, Copy)]
pub(crate) struct Pointer(pub(crate) Handle);

// SAFETY: the driver's handles may be used from every thread.
unsafe impl Send for Pointer {}
// SAFETY: as above; calls are serialized by the driver.
unsafe impl Sync for Pointer {}

#[derive(Clone, Copy)]
struct Kernel {
    function: Pointer,
    /// Dynamic shared memory that it may use so far.
    shared: usize,
}

/// How many GPUs the driver shows.
pub(crate) fn count() -> Result<usize> {
    let (driver, _) = libraries::driver()?;
    let mut count = 0;
    // SAFETY: written to a live integer.
    check(driver, "cuDeviceGetCount", unsafe { (driver.cuDeviceGetCount)(&mut count) })?;
    Ok(count as usize)
}

fn check(driver: &Driver, what: &str, status: Status) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    let mut why = ptr::null();
    // SAFETY: the driver writes the address of a static string.
    let why = unsafe {
        (driver.cuGetErrorString)(status, &mut why);
        text(why)
    };
    let kind = if status == bindings::OUT_OF_MEMORY { ErrorKind::Memory } else { ErrorKind::Failed };
    Err(Error::new(kind, format!("CUDA: {what}: {why} ({status})")))
}

impl Real {
    /// Opens GPU `number`.
    pub(crate) fn open(number: usize) -> Result<Self> {
        let (driver, major) = libraries::driver()?;
        let blas = libraries::blas(major)?;
        let (mut device, mut context) = (0, ptr::null_mut());
        let [mut stream, mut exchange_stream, mut upload_stream] = [ptr::null_mut(); 3];
        let (mut name, mut bus) = ([0; 256], [0; 32]);
        // SAFETY: all results are written to live variables, the name within its length.
        unsafe {
            check(driver, "cuDeviceGet", (driver.cuDeviceGet)(&mut device, number as c_int))?;
            check(driver, "cuDeviceGetName", (driver.cuDeviceGetName)(name.as_mut_ptr(), 255, device))?;
            check(driver, "cuDeviceGetPCIBusId", (driver.cuDeviceGetPCIBusId)(bus.as_mut_ptr(), 31, device))?;
            check(driver, "cuDevicePrimaryCtxRetain", (driver.cuDevicePrimaryCtxRetain)(&mut context, device))?;
            check(driver, "cuCtxSetCurrent", (driver.cuCtxSetCurrent)(context))?;
            for stream in [&mut stream, &mut exchange_stream, &mut upload_stream] {
                check(driver, "cuStreamCreate", (driver.cuStreamCreate)(stream, bindings::STREAM_NON_BLOCKING))?;
            }
        }
        let attribute = |number| {
            let mut value = 0;
            // SAFETY: written to a live integer.
            let status = unsafe { (driver.cuDeviceGetAttribute)(&mut value, number, device) };
            check(driver, "cuDeviceGetAttribute", status).map(|()| value)
        };
        let facts = Facts {
            // SAFETY: the driver ended the name with a zero.
            name: unsafe { text(name.as_ptr()) },
            // SAFETY: and the address.
            id: unsafe { text(bus.as_ptr()) },
            capability: (attribute(bindings::CAPABILITY[0])?, attribute(bindings::CAPABILITY[1])?),
            multiprocessors: attribute(bindings::MULTIPROCESSORS)? as usize,
            shared_memory: attribute(bindings::SHARED_MEMORY)? as usize,
        };
        if facts.capability.0 < 8 {
            let message = format!(
                "GPU {number} ({}) has compute capability {}.{}",
                facts.name, facts.capability.0, facts.capability.1
            );
            return Err(Error::missing(message).hint("the engine needs 8.0 or later (A100, RTX 30 and later)"));
        }
        let products = Products::new(blas, driver, Pointer(stream), &facts)?;
        Ok(Self {
            driver,
            context: Pointer(context),
            major,
            stream: Pointer(stream),
            exchange_stream: Pointer(exchange_stream),
            upload_stream: Pointer(upload_stream),
            compiler: Compiler::new(major, facts.capability),
            facts,
            modules: Mutex::default(),
            kernels: Mutex::default(),
            products,
            careful: std::env::var_os("ADVXL_CUDA_WAIT").is_some_and(|value| value == "1"),
        })
    }

    fn check(&self, what: &str, status: Status) -> Result<()> {
        check(self.driver, what, status)
    }

    fn handle(&self, stream: Stream) -> Handle {
        match stream {
            Stream::Compute => self.stream.0,
            Stream::Exchange => self.exchange_stream.0,
            Stream::Upload => self.upload_stream.0,
        }
    }

    fn load(&self, program: Program) -> Result<Pointer> {
        self.enter()?;
        self.compiler.code(program, |code| {
            let mut module = ptr::null_mut();
            // SAFETY: the code is whole; the driver copies it. What is damaged it refuses.
            let status = unsafe { (self.driver.cuModuleLoadData)(&mut module, code.as_ptr().cast()) };
            self.check(&format!("load of the kernels `{}`", program.name()), status).map(|()| Pointer(module))
        })
    }

    fn module(&self, program: Program) -> Result<Pointer> {
        if let Some(found) = self.modules.lock().expect("not poisoned").get(&program) {
            return Ok(*found);
        }
        let module = self.load(program)?;
        Ok(*self.modules.lock().expect("not poisoned").entry(program).or_insert(module))
    }

    /// The kernel, allowed to use so much dynamic shared memory.
    fn kernel(&self, program: Program, name: &str, shared: usize) -> Result<Pointer> {
        let known = self.kernels.lock().expect("not poisoned").get(name).copied();
        let mut kernel = match known {
            Some(kernel) if shared <= kernel.shared => return Ok(kernel.function),
            Some(kernel) => kernel,
            None => {
                let module = self.module(program)?;
                let text = CString::new(name).expect("no zeros");
                let mut function = ptr::null_mut();
                // SAFETY: the module is loaded and never unloaded; the name ends with a zero.
                let status = unsafe { (self.driver.cuModuleGetFunction)(&mut function, module.0, text.as_ptr()) };
                self.check(&format!("kernel `{name}`"), status)?;
                Kernel { function: Pointer(function), shared: 48 << 10 }
            }
        };
        if shared > kernel.shared {
            // SAFETY: the function is loaded.
            let status = unsafe {
                (self.driver.cuFuncSetAttribute)(kernel.function.0, bindings::FUNCTION_SHARED, shared as c_int)
            };
            self.check(&format!("kernel `{name}`: {shared} bytes of shared memory"), status)?;
            kernel.shared = shared;
        }
        self.kernels.lock().expect("not poisoned").insert(name.to_owned(), kernel);
        Ok(kernel.function)
    }
}

impl Machine for Real {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn enter(&self) -> Result<()> {
        // SAFETY: the primary context is retained for as long as the process runs.
        self.check("cuCtxSetCurrent", unsafe { (self.driver.cuCtxSetCurrent)(self.context.0) })
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.enter()?;
        let mut at = 0;
        // SAFETY: written to a live variable.
        self.check("cuMemAlloc", unsafe { (self.driver.cuMemAlloc_v2)(&mut at, bytes) }).map(|()| at)
    }

    unsafe fn release(&self, at: u64) {
        if self.enter().is_ok() {
            // SAFETY: by the caller's promise; the driver waits for work that uses it.
            unsafe { (self.driver.cuMemFree_v2)(at) };
        }
    }

    fn memory(&self) -> (usize, usize) {
        let (mut free, mut total) = (0, 0);
        if self.enter().is_ok() {
            // SAFETY: written to live variables.
            unsafe { (self.driver.cuMemGetInfo_v2)(&mut free, &mut total) };
        }
        (free, total)
    }

    unsafe fn send(&self, stream: Stream, from: &[u8], to: u64) -> Result<()> {
        self.enter()?;
        let stream = self.handle(stream);
        // SAFETY: by the caller's promise. Memory that is not pinned is copied aside before the call returns.
        let status = unsafe { (self.driver.cuMemcpyHtoDAsync_v2)(to, from.as_ptr().cast(), from.len(), stream) };
        self.check("copy to the GPU", status)
    }

    unsafe fn fetch(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: by the caller's promise; waited for before `to` is given back.
        let status =
            unsafe { (self.driver.cuMemcpyDtoHAsync_v2)(to.as_mut_ptr().cast(), from, to.len(), self.stream.0) };
        let copied = self.check("copy from the GPU", status);
        self.wait()?;
        copied
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: by the caller's promise.
        self.check("copy", unsafe { (self.driver.cuMemcpyDtoDAsync_v2)(to, from, bytes, self.stream.0) })
    }

    unsafe fn clear(&self, at: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: by the caller's promise.
        self.check("cuMemsetD8Async", unsafe { (self.driver.cuMemsetD8Async)(at, 0, bytes, self.stream.0) })
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        self.enter()?;
        let kernel = self.kernel(launch.program, launch.kernel, launch.shared)?;
        let mut cells: Vec<*mut c_void> =
            launch.arguments.iter().map(|argument| (&raw const argument.0).cast_mut().cast()).collect();
        let [x, y, z] = launch.grid;
        let stream = self.handle(launch.stream);
        // SAFETY: the cells hold as many arguments as the kernel takes, each of at most eight bytes, by the caller's
        // promise; the driver copies them before it returns.
        let status = unsafe {
            let shared = launch.shared as u32;
            (self.driver.cuLaunchKernel)(
                kernel.0,
                x,
                y,
                z,
                launch.threads,
                1,
                1,
                shared,
                stream,
                cells.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        self.check(&format!("kernel `{}`", launch.kernel), status)?;
        if !self.careful {
            return Ok(());
        }
        // SAFETY: the stream is never destroyed.
        let status = unsafe { (self.driver.cuStreamSynchronize)(stream) };
        self.check(&format!("kernel `{}`", launch.kernel), status)
    }

    unsafe fn product(&self, product: &Product, operands: &Operands) -> Result<()> {
        self.enter()?;
        // SAFETY: by the caller's promise.
        unsafe { self.products.run(product, operands) }?;
        if self.careful { self.wait() } else { Ok(()) }
    }

    fn algorithms(&self) -> String {
        self.products.choices()
    }

    fn adopt_algorithms(&self, text: &str) -> bool {
        self.products.adopt(text)
    }

    fn prepare(&self, programs: &[Program]) -> Result<()> {
        thread::scope(|scope| {
            let handles: Vec<_> = programs.iter().map(|program| scope.spawn(|| self.module(*program))).collect();
            handles.into_iter().try_for_each(|handle| handle.join().expect("does not panic").map(drop))
        })
    }

    fn wait(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream is never destroyed.
        let waited = self.check("waiting for the GPU", unsafe { (self.driver.cuStreamSynchronize)(self.stream.0) });
        waited.map_err(|error| match self.careful {
            true => error,
            false => error.hint("run the same command with ADVXL_CUDA_WAIT=1, which names the kernel that fails"),
        })
    }

    fn time(&self, work: &mut dyn FnMut()) -> Result<f64> {
        self.enter()?;
        elapsed(self.driver, self.stream, || {
            work();
            Ok(())
        })
    }

    fn record(&self, stream: Stream) -> Result<EventId> {
        self.enter()?;
        let mut event = ptr::null_mut();
        // SAFETY: written to a live variable; the stream is never destroyed.
        unsafe {
            self.check("cuEventCreate", (self.driver.cuEventCreate)(&mut event, bindings::EVENT_WITHOUT_TIME))?;
            let recorded = self.check("cuEventRecord", (self.driver.cuEventRecord)(event, self.handle(stream)));
            if recorded.is_err() {
                (self.driver.cuEventDestroy_v2)(event);
            }
            recorded.map(|()| event as EventId)
        }
    }

    unsafe fn follow(&self, stream: Stream, event: EventId) -> Result<()> {
        self.enter()?;
        // SAFETY: by the caller's promise.
        let status = unsafe { (self.driver.cuStreamWaitEvent)(self.handle(stream), event as Handle, 0) };
        self.check("cuStreamWaitEvent", status)
    }

    unsafe fn is_done(&self, event: EventId) -> Result<bool> {
        self.enter()?;
        // SAFETY: by the caller's promise.
        match unsafe { (self.driver.cuEventQuery)(event as Handle) } {
            bindings::NOT_READY => Ok(false),
            status => self.check("cuEventQuery", status).map(|()| true),
        }
    }

    unsafe fn destroy(&self, event: EventId) {
        if self.enter().is_ok() {
            // SAFETY: by the caller's promise; the driver keeps it for what still waits.
            unsafe { (self.driver.cuEventDestroy_v2)(event as Handle) };
        }
    }

    fn nccl(&self) -> Result<&'static Nccl> {
        libraries::nccl(self.major)
    }

    fn exchange(&self, work: ExchangeWork) -> Result<()> {
        self.enter()?;
        work(self.exchange_stream.0)
    }
}

/// Seconds between two events around work on a stream.
pub(crate) fn elapsed(driver: &Driver, stream: Pointer, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let [mut start, mut end] = [ptr::null_mut(); 2];
    let mut milliseconds = 0.0;
    // SAFETY: events are written to live variables and destroyed once; the stream is never destroyed.
    unsafe {
        check(driver, "cuEventCreate", (driver.cuEventCreate)(&mut start, 0))?;
        check(driver, "cuEventCreate", (driver.cuEventCreate)(&mut end, 0))?;
        let timed = (|| {
            check(driver, "cuEventRecord", (driver.cuEventRecord)(start, stream.0))?;
            work()?;
            check(driver, "cuEventRecord", (driver.cuEventRecord)(end, stream.0))?;
            check(driver, "waiting for the GPU", (driver.cuEventSynchronize)(end))?;
            check(driver, "cuEventElapsedTime", (driver.cuEventElapsedTime)(&mut milliseconds, start, end))
        })();
        (driver.cuEventDestroy_v2)(start);
        (driver.cuEventDestroy_v2)(end);
        timed?;
    }
    Ok(f64::from(milliseconds) / 1e3)
}
