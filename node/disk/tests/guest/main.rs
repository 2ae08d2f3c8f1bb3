//! Guest file systems, made by the tools of their own people and read by us. The tools are those of Linux.

#![cfg(unix)]

mod damage;
mod ext;
mod fat;
mod images;
mod ntfs;
mod page_files;
mod tables;
