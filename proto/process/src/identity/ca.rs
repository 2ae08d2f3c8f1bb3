//! The certificate authority of a fabric: made once, kept by the coordinators' operator and in the
//! recovery kit, needed only to issue identities.

use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose, NameConstraints, SanType, SerialNumber,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::enrolment::{ENROLLED, SealedEnrolment};
use super::peer::name_of;
use super::{IdentityError, PeerName, Role, SigningKey, file, read, read_private};
use crate::fs;
use crate::secret::kek::KeyEncryptionKey;
use crate::secret::{Secret, SecretBytes};

/// File of the authority's key.
const CA_KEY: &str = "ca.key";

/// The authority outlives every disk that it protects; replacing it means a new fabric.
const CA_VALIDITY: Duration = Duration::from_secs(20 * 365 * 24 * 3600);

/// Certificates begin a little earlier, for machines whose clocks lag.
pub(crate) const BACKDATED: Duration = Duration::from_secs(3600);

/// The authority of one fabric.
pub struct FabricCa {
    fabric: String,
    cert_pem: String,
    key: KeyPair,
}

impl std::fmt::Debug for FabricCa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FabricCa({})", self.fabric)
    }
}

/// What a member needs to be one; [`Self::save`] writes its identity directory.
#[derive(Debug)]
pub struct IssuedIdentity {
    /// Who it is for.
    pub peer: PeerName,
    /// The authority's certificate.
    pub ca_pem: String,
    /// The member's certificate.
    pub cert_pem: String,
    /// Its private key, PEM.
    pub key_pem: SecretBytes,
    /// Its Ed25519 signing key, PKCS #8.
    pub sign_pkcs8: SecretBytes,
}

impl FabricCa {
    /// Makes the authority of a new fabric.
    ///
    /// # Errors
    /// [`IdentityError::Name`] for an unusable fabric id, [`IdentityError::Issue`].
    pub fn create(fabric: &str) -> Result<Self, IdentityError> {
        let peer = checked(fabric, Role::Coordinator, "ca")?;
        let key = KeyPair::generate().map_err(IdentityError::Issue)?;
        let now = SystemTime::now();
        let mut params = params(&peer, now - BACKDATED, now + CA_VALIDITY)?;
        params.distinguished_name = common_name(&format!("outrider fabric {fabric}"));
        // One level below it: the enrolment authority.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let cert_pem = params.self_signed(&key).map_err(IdentityError::Issue)?.pem();
        Ok(Self { fabric: fabric.to_owned(), cert_pem, key })
    }

    /// Reads `ca.pem` and `ca.key`.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn load(dir: &Path) -> Result<Self, IdentityError> {
        let (cert_path, key_path) = (dir.join(file::CA), dir.join(CA_KEY));
        let unreadable =
            |path: &Path, expected| IdentityError::Unreadable { path: path.to_owned(), expected };
        let cert_pem = String::from_utf8(read(&cert_path)?)
            .map_err(|_| unreadable(&cert_path, "a PEM certificate"))?;
        let der = CertificateDer::from_pem_slice(cert_pem.as_bytes())
            .map_err(|_| unreadable(&cert_path, "a PEM certificate"))?;
        let fabric = name_of(&der)
            .map_err(|source| IdentityError::NotOurs { path: cert_path.clone(), source })?
            .fabric;
        let key_pem = read_private(&key_path)?;
        let key = std::str::from_utf8(&key_pem)
            .ok()
            .and_then(|pem| KeyPair::from_pem(pem).ok())
            .ok_or_else(|| unreadable(&key_path, "a PEM private key"))?;
        Ok(Self { fabric, cert_pem, key })
    }

    /// Writes `ca.pem` and `ca.key` (readable by the owner alone).
    ///
    /// # Errors
    /// [`IdentityError::Write`].
    pub fn save(&self, dir: &Path) -> Result<(), IdentityError> {
        fs::create_dir_durable(dir)?;
        fs::write_private(&dir.join(CA_KEY), self.key.serialize_pem().as_bytes())?;
        Ok(fs::write_atomic(&dir.join(file::CA), self.cert_pem.as_bytes())?)
    }

    /// The fabric's id.
    pub fn fabric(&self) -> &str {
        &self.fabric
    }

    /// The authority's certificate.
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// Issues an identity that is valid from now on.
    ///
    /// # Errors
    /// [`IdentityError::Name`], [`IdentityError::Issue`].
    pub fn issue(
        &self,
        role: Role,
        name: &str,
        validity: Duration,
    ) -> Result<IssuedIdentity, IdentityError> {
        let now = SystemTime::now();
        self.issue_between(role, name, now - BACKDATED, now + validity)
    }

    /// Issues an identity for a given time.
    ///
    /// # Errors
    /// As [`Self::issue`].
    pub fn issue_between(
        &self,
        role: Role,
        name: &str,
        not_before: SystemTime,
        not_after: SystemTime,
    ) -> Result<IssuedIdentity, IdentityError> {
        let peer = checked(&self.fabric, role, name)?;
        let params = member_params(&peer, not_before, not_after)?;
        let key = KeyPair::generate().map_err(IdentityError::Issue)?;
        let issuer =
            Issuer::from_ca_cert_pem(&self.cert_pem, &self.key).map_err(IdentityError::Issue)?;
        let cert = params.signed_by(&key, &issuer).map_err(IdentityError::Issue)?;
        Ok(IssuedIdentity {
            peer,
            ca_pem: self.cert_pem.clone(),
            cert_pem: cert.pem(),
            key_pem: SecretBytes::new(key.serialize_pem().into_bytes()),
            sign_pkcs8: SigningKey::generate_pkcs8(),
        })
    }
}

impl FabricCa {
    /// Makes the intermediate that coordinators hold to let hosts and storage nodes join: see [`super::enrolment`].
    ///
    /// # Errors
    /// [`IdentityError::Issue`].
    pub fn enrolment(&self, kek: &KeyEncryptionKey) -> Result<SealedEnrolment, IdentityError> {
        let peer = checked(&self.fabric, Role::Coordinator, "enrolment")?;
        let key = KeyPair::generate().map_err(IdentityError::Issue)?;
        let now = SystemTime::now();
        let mut params = params(&peer, now - BACKDATED, now + CA_VALIDITY)?;
        params.distinguished_name = common_name(&format!("outrider enrolment {}", self.fabric));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: ENROLLED
                .map(|role| GeneralSubtree::DnsName(role.server_name()))
                .to_vec(),
            excluded_subtrees: Vec::new(),
        });
        params.use_authority_key_identifier_extension = true;
        let issuer =
            Issuer::from_ca_cert_pem(&self.cert_pem, &self.key).map_err(IdentityError::Issue)?;
        let cert = params.signed_by(&key, &issuer).map_err(IdentityError::Issue)?;
        Ok(SealedEnrolment::seal(&self.fabric, cert.pem(), &key, kek))
    }
}

impl IssuedIdentity {
    /// Writes an identity directory that `Identity::load` reads.
    ///
    /// # Errors
    /// [`IdentityError::Write`].
    pub fn save(&self, dir: &Path) -> Result<(), IdentityError> {
        fs::create_dir_durable(dir)?;
        fs::write_private(&dir.join(file::KEY), self.key_pem.expose())?;
        fs::write_private(&dir.join(file::SIGN), self.sign_pkcs8.expose())?;
        fs::write_atomic(&dir.join(file::CA), self.ca_pem.as_bytes())?;
        Ok(fs::write_atomic(&dir.join(file::CERT), self.cert_pem.as_bytes())?)
    }
}

pub(super) fn checked(fabric: &str, role: Role, name: &str) -> Result<PeerName, IdentityError> {
    for part in [fabric, name] {
        if !PeerName::is_valid_name(part) {
            return Err(IdentityError::Name { role, name: part.to_owned() });
        }
    }
    Ok(PeerName { fabric: fabric.to_owned(), role, name: name.to_owned() })
}

/// What the certificate of a member says.
pub(super) fn member_params(
    peer: &PeerName,
    not_before: SystemTime,
    not_after: SystemTime,
) -> Result<CertificateParams, IdentityError> {
    let mut params = params(peer, not_before, not_after)?;
    let dns = peer.role.server_name().try_into().map_err(IdentityError::Issue)?;
    params.subject_alt_names.push(SanType::DnsName(dns));
    params.distinguished_name = common_name(&format!("outrider {}", peer.role));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn params(
    peer: &PeerName,
    not_before: SystemTime,
    not_after: SystemTime,
) -> Result<CertificateParams, IdentityError> {
    let uri = peer.to_uri().try_into().map_err(IdentityError::Issue)?;
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(uri)];
    params.not_before = not_before.into();
    params.not_after = not_after.into();
    // RFC 5280, 4.1.2.2: positive and at most 20 octets.
    let mut serial = *Secret::<16>::random().expose();
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}
