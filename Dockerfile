# One image for coordinators and storage nodes: the one binary, no shell needed to run it.
#
#   docker build -t outrider:0.1.0 .
#   docker run --rm outrider:0.1.0 --help

FROM rust:1.95-slim-bookworm AS build
# The C parts of ring and zstd; nothing else is compiled from C, nothing from C++.
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev make \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin outrider \
 && install -D -m 755 target/release/outrider /out/outrider \
 && install -d -m 750 -o 10001 -g 10001 /out/data

FROM debian:bookworm-slim
# No certificates are needed: a fabric trusts its own authority only.
COPY --from=build /out/outrider /usr/local/bin/outrider
COPY --from=build --chown=10001:10001 /out/data /var/lib/outrider
USER 10001:10001
WORKDIR /var/lib/outrider
VOLUME /var/lib/outrider
# gRPC and console, chunks over QUIC, metrics and health.
EXPOSE 9800/tcp 9811/udp 9809/tcp
ENTRYPOINT ["/usr/local/bin/outrider"]
