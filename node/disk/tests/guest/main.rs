//! Guest file systems, made by the tools of their own people and read by us.

mod damage;
mod ext;
mod fat;
mod images;
mod ntfs;
mod page_files;
mod tables;
