//! Frames on a QUIC stream, for both ends.

use bytes::{Buf, Bytes, BytesMut};
use outrider_proto::frame::{Frame, FrameError};
use quinn::{ReadError, RecvStream, SendStream, WriteError};
use tokio::io::AsyncReadExt;

/// Bytes asked of the stream at once at least.
const READ_AHEAD: usize = 64 << 10;

/// A stream that did not carry a whole frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameIoError {
    /// The connection or stream ended.
    #[error("the stream broke: {0}")]
    Broken(#[from] std::io::Error),
    /// The peer stopped reading, or the connection ended.
    #[error("the stream cannot be written: {0}")]
    Write(#[from] WriteError),
    /// The peer's bytes are no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The stream ended inside a frame, or before the one expected.
    #[error("the stream ended where {expected} was expected")]
    Ended {
        /// What was expected.
        expected: &'static str,
    },
}

impl FrameIoError {
    /// Whether the peer broke the protocol, as opposed to a lost connection.
    #[must_use]
    pub fn is_protocol(&self) -> bool {
        matches!(self, Self::Frame(_) | Self::Ended { .. })
    }

    /// Whether the connection ended, as opposed to this stream.
    #[must_use]
    pub fn is_connection(&self) -> bool {
        match self {
            Self::Broken(error) => !matches!(
                error.get_ref().and_then(|e| e.downcast_ref::<ReadError>()),
                Some(ReadError::Reset(_))
            ),
            Self::Write(error) => matches!(error, WriteError::ConnectionLost(_)),
            _ => false,
        }
    }
}

/// Reads frames. Records are slices of the read buffer: a byte is copied once, out of the packets.
#[derive(Debug)]
pub struct FrameReader {
    stream: RecvStream,
    buffer: BytesMut,
}

impl FrameReader {
    /// A reader at the beginning of a stream.
    #[must_use]
    pub fn new(stream: RecvStream) -> Self {
        Self { stream, buffer: BytesMut::new() }
    }

    /// The next frame; `None` at the end of the stream.
    ///
    /// # Errors
    /// [`FrameIoError`]. A length beyond the cap is refused before anything is allocated.
    pub async fn next(&mut self) -> Result<Option<Frame>, FrameIoError> {
        if !self.fill(4).await? {
            return if self.buffer.is_empty() {
                Ok(None)
            } else {
                Err(FrameIoError::Ended { expected: "a frame's length" })
            };
        }
        let mut head = [0; 4];
        head.copy_from_slice(&self.buffer[..4]);
        let len = Frame::check_len(u32::from_le_bytes(head))?;
        self.buffer.advance(4);
        if !self.fill(len).await? {
            return Err(FrameIoError::Ended { expected: "the rest of a frame" });
        }
        let body = self.buffer.split_to(len).freeze();
        Ok(Some(Frame::decode(&body)?))
    }

    /// The next frame, which has to come.
    ///
    /// # Errors
    /// [`FrameIoError`].
    pub async fn expect(&mut self, expected: &'static str) -> Result<Frame, FrameIoError> {
        self.next().await?.ok_or(FrameIoError::Ended { expected })
    }

    /// Tells the peer that the rest is not wanted.
    pub fn stop(&mut self, code: u32) {
        // The stream may have ended already.
        let _ = self.stream.stop(code.into());
    }

    /// Reads until `len` bytes are buffered; false if the stream ends before.
    async fn fill(&mut self, len: usize) -> Result<bool, FrameIoError> {
        while self.buffer.len() < len {
            let missing = len - self.buffer.len();
            if self.buffer.capacity() - self.buffer.len() < missing {
                self.buffer.reserve(missing.max(READ_AHEAD));
            }
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Writes a frame; the record's bytes are handed over, not copied.
///
/// # Errors
/// [`FrameIoError::Write`].
pub async fn write_frame(stream: &mut SendStream, frame: &Frame) -> Result<(), FrameIoError> {
    let (head, record) = frame.encode();
    let mut parts: [Bytes; 2] = [head, record];
    let used = if parts[1].is_empty() { 1 } else { 2 };
    Ok(stream.write_all_chunks(&mut parts[..used]).await?)
}

/// Writes the last frame of a stream and ends it.
///
/// # Errors
/// [`FrameIoError::Write`].
pub async fn finish_with(stream: &mut SendStream, frame: &Frame) -> Result<(), FrameIoError> {
    write_frame(stream, frame).await?;
    finish(stream);
    Ok(())
}

/// Ends a stream.
pub fn finish(stream: &mut SendStream) {
    // Fails only on a stream that was finished or reset already.
    let _ = stream.finish();
}
