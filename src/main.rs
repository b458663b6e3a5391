//! The program: everything is in [`advxl::cli`].

fn main() -> std::process::ExitCode {
    advxl::cli::run()
}
