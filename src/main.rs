//! The `advxl` program; see [`advxl::cli`].

fn main() -> std::process::ExitCode {
    advxl::cli::run()
}
