//! The requests of a publish: what AWS calls them, what whoever makes them must be permitted, and which of them are on
//! the bill.
//!
//! Sources: "Actions, resources, and condition keys" of each service in the Service Authorization Reference; "Required
//! permissions for Amazon S3 API operations" in the S3 User Guide; the pages "Amazon S3 pricing" (requests, storage
//! class Standard) and "Amazon EBS pricing" (EBS direct APIs).

/// How AWS bills a request by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Billed {
    /// As "PUT, COPY, POST, LIST" of S3.
    S3Put,
    /// As "GET, SELECT, and all other requests" of S3.
    S3Get,
    /// As `PutSnapshotBlock` of EBS direct.
    Block,
}

macro_rules! actions {
    ($($action:ident $call:literal [$($permission:literal),+] $($billed:ident)?;)+) => {
        /// A kind of request.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Action {
            $(#[doc = concat!("`", $call, "`.")] $action,)+
        }

        impl Action {
            /// Its service and its name there, e.g. `s3:UploadPart`.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$action => $call,)+ }
            }

            /// What whoever makes it must be permitted, as policies name that.
            #[must_use]
            pub fn permissions(self) -> &'static [&'static str] {
                match self { $(Self::$action => &[$($permission),+],)+ }
            }

            /// How it is billed; none: it costs nothing by itself.
            #[must_use]
            pub fn billed(self) -> Option<Billed> {
                match self { $(Self::$action => [$(Billed::$billed)?].first().copied(),)+ }
            }

            /// That of this name.
            pub(super) fn named(call: &str) -> Option<Self> {
                match call { $($call => Some(Self::$action),)+ _ => None }
            }
        }
    };
}

// Tags that a thing gets when it is made need the permission to tag it; versions of objects are deleted with one of their own.
actions! {
    CompleteSnapshot "ebs:CompleteSnapshot" ["ebs:CompleteSnapshot"];
    PutSnapshotBlock "ebs:PutSnapshotBlock" ["ebs:PutSnapshotBlock"] Block;
    StartSnapshot "ebs:StartSnapshot" ["ebs:StartSnapshot", "ec2:CreateTags"];
    CopyImage "ec2:CopyImage" ["ec2:CopyImage", "ec2:CreateTags"];
    CreateTags "ec2:CreateTags" ["ec2:CreateTags"];
    DeleteSnapshot "ec2:DeleteSnapshot" ["ec2:DeleteSnapshot"];
    DeregisterImage "ec2:DeregisterImage" ["ec2:DeregisterImage"];
    DescribeImages "ec2:DescribeImages" ["ec2:DescribeImages"];
    DescribeImportSnapshotTasks "ec2:DescribeImportSnapshotTasks" ["ec2:DescribeImportSnapshotTasks"];
    DescribeSnapshots "ec2:DescribeSnapshots" ["ec2:DescribeSnapshots"];
    EnableImageDeprecation "ec2:EnableImageDeprecation" ["ec2:EnableImageDeprecation"];
    EnableImageDeregistrationProtection "ec2:EnableImageDeregistrationProtection"
        ["ec2:EnableImageDeregistrationProtection"];
    GetEbsEncryptionByDefault "ec2:GetEbsEncryptionByDefault" ["ec2:GetEbsEncryptionByDefault"];
    GetImageBlockPublicAccessState "ec2:GetImageBlockPublicAccessState" ["ec2:GetImageBlockPublicAccessState"];
    GetSnapshotBlockPublicAccessState "ec2:GetSnapshotBlockPublicAccessState"
        ["ec2:GetSnapshotBlockPublicAccessState"];
    ImportSnapshot "ec2:ImportSnapshot" ["ec2:ImportSnapshot", "ec2:CreateTags"];
    ModifyImageAttribute "ec2:ModifyImageAttribute" ["ec2:ModifyImageAttribute"];
    ModifySnapshotAttribute "ec2:ModifySnapshotAttribute" ["ec2:ModifySnapshotAttribute"];
    RegisterImage "ec2:RegisterImage" ["ec2:RegisterImage", "ec2:CreateTags"];
    AbortMultipartUpload "s3:AbortMultipartUpload" ["s3:AbortMultipartUpload"];
    CompleteMultipartUpload "s3:CompleteMultipartUpload" ["s3:PutObject"] S3Put;
    CreateMultipartUpload "s3:CreateMultipartUpload" ["s3:PutObject"] S3Put;
    DeleteObject "s3:DeleteObject" ["s3:DeleteObject", "s3:DeleteObjectVersion"];
    GetBucketLocation "s3:GetBucketLocation" ["s3:GetBucketLocation"] S3Get;
    HeadBucket "s3:HeadBucket" ["s3:ListBucket"] S3Get;
    HeadObject "s3:HeadObject" ["s3:GetObject", "s3:ListBucket"] S3Get;
    ListMultipartUploads "s3:ListMultipartUploads" ["s3:ListBucketMultipartUploads"] S3Put;
    ListParts "s3:ListParts" ["s3:ListMultipartUploadParts"] S3Put;
    PutObject "s3:PutObject" ["s3:PutObject"] S3Put;
    UploadPart "s3:UploadPart" ["s3:PutObject"] S3Put;
    UploadPartCopy "s3:UploadPartCopy" ["s3:PutObject", "s3:GetObject"] S3Put;
    GetParameter "ssm:GetParameter" ["ssm:GetParameter"];
    PutParameter "ssm:PutParameter" ["ssm:PutParameter"];
}
