//! Layout-aware client of the storage tier behind the ChunkTransport trait; quinn, no sled.
