"""A radiograph-like array, and DICOM files made of it on the spot."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

UID = "1.2.826.0.1.3680043.8.498.1"
MakeDicom = Callable[..., Dataset]


@pytest.fixture(scope="session")
def picture() -> npt.NDArray[np.uint16]:
    """uint16 (48, 40), smooth with some noise, 12 bits."""
    y, x = np.mgrid[:48, :40]
    noise = np.random.default_rng(0).integers(0, 200, (48, 40))
    return (y * 60 + x * 20 + noise).astype(np.uint16)


@pytest.fixture(scope="session")
def make_dicom() -> MakeDicom:
    """A CR data set of an integer array; keywords override elements, None removes one."""

    def make(stored: npt.NDArray[np.integer], **values: object) -> Dataset:
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
        ds.file_meta.MediaStorageSOPInstanceUID = UID
        bits = stored.dtype.itemsize * 8
        elements = {
            "SOPClassUID": ComputedRadiographyImageStorage,
            "SOPInstanceUID": UID,
            "PatientName": "SECRET^NAME",
            "PatientID": "SECRET-ID",
            "Modality": "CR",
            "BodyPartExamined": "CHEST",
            "ViewPosition": "PA",
            "Rows": stored.shape[-2],
            "Columns": stored.shape[-1],
            "SamplesPerPixel": 1,
            "BitsAllocated": bits,
            "BitsStored": bits,
            "HighBit": bits - 1,
            "PixelRepresentation": int(stored.dtype.kind == "i"),
            "PhotometricInterpretation": "MONOCHROME2",
            "PixelData": stored.tobytes(),
            **values,
        }
        if "BitsStored" in values:
            elements.setdefault("HighBit", 0)
            elements["HighBit"] = values.get("HighBit", int(str(values["BitsStored"])) - 1)
        for keyword, value in elements.items():
            if value is not None:
                setattr(ds, keyword, value)
        if "PixelData" in ds:
            ds["PixelData"].VR = "OW"
        return ds

    return make


@pytest.fixture(scope="session")
def to_bytes() -> Callable[[Dataset], bytes]:
    """The data set as a DICOM file."""

    def write(ds: Dataset) -> bytes:
        buffer = io.BytesIO()
        ds.save_as(buffer, enforce_file_format=True)
        return buffer.getvalue()

    return write
